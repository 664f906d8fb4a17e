"""A causal language model that runs on slots: prompts in, one token a row on, fp32 logits out.

Knows everything about the model's architecture that sampling needs: masks (full and sliding), the output head, the
context limit. What it does not know it refuses: when it is built, a few tokens are run both ways, through the slots and
through the model as transformers runs it, and a difference beyond rounding is an `UnsupportedError`.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from opd.errors import UnsupportedError
from opd.ops import OutputHead
from services.trainer.rollout.grouped_attention import ATTENTION_NAME
from services.trainer.rollout.slot_cache import Decode, Prefill, SlotCache

logger = logging.getLogger(__name__)

_ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_NUM_PROBE_TOKENS = 6


class SlotModel:
    """The student behind two calls, `prefill` and `decode`, over a `SlotCache`."""

    def __init__(
        self, model: PreTrainedModel, *, num_defined_ids: int, autocast_dtype: torch.dtype | None = None
    ) -> None:
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.num_defined_ids = num_defined_ids
        self.device = model.device
        self._decoder = model.get_decoder()
        self._autocast_dtype = autocast_dtype
        self._kept_cache: SlotCache | None = None
        self._layer_types = _layer_types(self.config)
        self._check_attention()
        self._check_probe()

    @property
    def max_context(self) -> int:
        return int(self.config.max_position_embeddings)

    def cache(self, num_slots: int) -> SlotCache:
        """Storage for one batch; what earlier rows left in it is hidden by the masks.

        Host memory is kept for the next batch, since fresh pages cost more than writing them; a device's memory is
        given back, since training needs it.
        """
        kept, kind = self._kept_cache, (self.device, self.model.dtype)
        if kept is not None and kept.fits(num_slots, kind):
            return kept
        cache = SlotCache(num_layers=self.config.num_hidden_layers, num_slots=num_slots, kind=kind)
        self._kept_cache = cache if self.device.type == "cpu" else None
        return cache

    @contextmanager
    def sampling_mode(self) -> Iterator[None]:
        """Evaluation mode without gradients and with the slots' own attention; all is put back afterwards."""
        was_training, implementation = self.model.training, self.config._attn_implementation
        self.device = self.model.device
        self.model.eval()
        if implementation == "sdpa":
            self.config._attn_implementation = ATTENTION_NAME
        try:
            with torch.no_grad(), self._autocast():
                yield
        except BaseException:
            # It may hold NaN, which a mask does not hide: 0 times NaN is NaN.
            self._kept_cache = None
            raise
        finally:
            self.config._attn_implementation = implementation
            self.model.train(was_training)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None)

    def prefill(self, cache: SlotCache, prompts: Sequence[torch.Tensor], plan: Prefill) -> None:
        """Stores the keys and values of distinct prompts, padded on the right where no real token looks."""
        token_ids_BL = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(self.device)
        places_L = torch.arange(token_ids_BL.shape[1], device=self.device)
        cache.plan = plan
        masks = self._masks(places_L[None], places_L)
        self._run(token_ids_BL, places_L.expand_as(token_ids_BL), masks, cache)

    def decode(
        self, cache: SlotCache, token_ids_N: torch.Tensor, positions_N: torch.Tensor, horizon: int
    ) -> torch.Tensor:
        """Runs one token a row; returns the next token's fp32 logits over the defined ids, [N, num_defined_ids]."""
        rows_N = torch.arange(token_ids_N.shape[0], device=self.device)
        cache.plan = Decode(rows_N=rows_N, positions_N=positions_N, horizon=horizon)
        masks = self._masks(positions_N[:, None], torch.arange(horizon, device=self.device))
        hidden_N1H = self._run(token_ids_N[:, None], positions_N[:, None], masks, cache)
        return self._head().logits(hidden_N1H[:, 0])[:, : self.num_defined_ids]

    def _run(self, token_ids: torch.Tensor, positions: torch.Tensor, masks: Any, cache: SlotCache) -> torch.Tensor:
        output = self._decoder(
            input_ids=token_ids,
            position_ids=positions,
            attention_mask=masks,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _masks(self, queries_BQ: torch.Tensor, places_L: torch.Tensor) -> Any:
        """What each query position may look at, [B, 1, Q, L]; one mask per kind of layer where there are several."""
        full = places_L <= queries_BQ[..., None]
        masks = {"full_attention": full}
        if "sliding_attention" in self._layer_types:
            masks["sliding_attention"] = full & (places_L > queries_BQ[..., None] - self.config.sliding_window)
        shaped = {name: self._as_attention_takes_it(mask[:, None]) for name, mask in masks.items()}
        if getattr(self.config, "layer_types", None) is not None:
            return shaped
        return shaped[next(iter(self._layer_types))]

    def _as_attention_takes_it(self, mask: torch.Tensor) -> torch.Tensor:
        if self.config._attn_implementation != "eager":
            return mask
        additive = torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device)
        return additive.masked_fill_(~mask, torch.finfo(self.model.dtype).min)

    def _head(self) -> OutputHead:
        # Built anew each time, so that it never holds weights which training has replaced.
        layer = self.model.get_output_embeddings()
        return OutputHead(
            weight_VH=layer.weight,
            bias_V=getattr(layer, "bias", None),
            logit_scale=_logit_scale(self.config),
            soft_cap=getattr(self.config, "final_logit_softcapping", None),
        )

    def _check_attention(self) -> None:
        implementation = self.config._attn_implementation
        if implementation not in _ATTENTION_IMPLEMENTATIONS:
            choices = " or ".join(_ATTENTION_IMPLEMENTATIONS)
            raise UnsupportedError(f"attn_implementation={implementation!r} cannot sample; load with {choices}")
        unknown = self._layer_types - _LAYER_TYPES
        if unknown:
            kinds = ", ".join(sorted(unknown))
            name = self.config.model_type
            raise UnsupportedError(f"model_type={name!r} has {kinds} layers, which slots cannot hold; use vLLM")

    def _check_probe(self) -> None:
        """Compares slots and plain forward pass on a few tokens."""
        count = min(_NUM_PROBE_TOKENS, self.max_context)
        token_ids_L = torch.arange(count, device=self.device) % self.num_defined_ids
        with self.sampling_mode():
            cache = self.cache(1)
            cache.reserve(count, count)
            first = torch.zeros(1, dtype=torch.int64, device=self.device)
            self.prefill(cache, [token_ids_L[:-1]], Prefill(slots_M=first, sources_M=first))
            found_V = self.decode(cache, token_ids_L[-1:], first + count - 1, count)[0]
        was_training = self.model.training
        with torch.no_grad():
            expected_V = self.model.eval()(token_ids_L[None]).logits[0, -1, : self.num_defined_ids].float()
        self.model.train(was_training)
        is_exact = self.model.dtype == torch.float32 and self._autocast_dtype is None
        tolerance = (1e-3 if is_exact else 0.1) * max(1.0, float(expected_V.abs().max()))
        difference = float((found_V - expected_V).abs().max())
        # A model that already is non-finite is reported with the rollout it spoils.
        if bool(expected_V.isfinite().all()) and not difference <= tolerance:
            raise UnsupportedError(
                f"model_type={self.config.model_type!r}: logits over slots differ by {difference:.3g} from the "
                "model's own, so it cannot be sampled exactly this way; use vLLM"
            )


def _layer_types(config: Any) -> set[str]:
    declared = getattr(config, "layer_types", None)
    if declared is not None:
        return set(declared)
    return {"sliding_attention" if getattr(config, "sliding_window", None) is not None else "full_attention"}


def _logit_scale(config: Any) -> float:
    """What the model multiplies its logits with: Cohere states the factor, Granite its inverse."""
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    if divisor is not None:
        return 1.0 / float(divisor)
    return 1.0 if scale is None else float(scale)
