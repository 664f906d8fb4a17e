"""Loading a Hugging Face causal language model for scoring: decoder, output head, vocabulary, limits.

The output head is run by us, in row chunks, so everything that stands between the last hidden state and the logits
must be known: a scale, a soft-cap, a bias. What the configuration declares is taken over, and a probe compares the
result with the model's own logits before anything is served; a model that does not agree is refused by name.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache
from transformers.utils import logging as transformers_logging

from opd.errors import ConfigError, first_line
from opd.ops import OutputHead
from opd.vocabulary import Vocabulary, describe_vocabulary
from services.teacher_server.engines.cache_layers import PromptsLayer, SharedLayer
from services.teacher_server.engines.model_folder import check_folder
from services.teacher_server.engines.prefix_cache import Prefix

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOAD_FAULTS = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)
_PROBE_TOKENS = 16
_FP32_TOLERANCE = 1e-3
# Low-precision logits of the model itself are rounded to this share of their size; ours are not.
_LOW_PRECISION_TOLERANCE = 2.0**-6


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model ready to be scored with; the names say what the engine needs of it."""

    decoder: nn.Module
    """Everything up to and with the final norm; returns `last_hidden_state`."""
    head: OutputHead
    vocabulary: Vocabulary
    eos_token_ids: tuple[int, ...]
    max_context: int
    device: torch.device
    dtype_name: str
    takes_position_ids: bool
    runs_in_threads: bool
    """Whether a forward pass leaves the modules as they were, so that several may run at the same time."""

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Hidden states [B, T, H] after the final norm, of right-padded sequences that all start at position 0."""
        return self._run(ids_BT, None, 0)

    def hidden_with_prefixes(self, ids_BT: Tensor, sizes: Mapping[int, int]) -> tuple[Tensor, dict[int, Prefix]]:
        """The same, and what a continuation of the first P tokens of some rows needs; `sizes` is row -> P."""
        if not sizes:
            return self.hidden(ids_BT), {}
        cache = Cache(layer_class_to_replicate=partial(PromptsLayer, sizes))
        hidden_BTH = self._run(ids_BT, cache, 0)
        prefixes = {
            row: Prefix(
                layers=tuple(layer.prompts[row] for layer in cache.layers),
                last_hidden_H=hidden_BTH[row, size - 1].clone(),
            )
            for row, size in sizes.items()
        }
        return hidden_BTH, prefixes

    def hidden_after(self, prefix: Prefix, ids_BT: Tensor) -> Tensor:
        """Hidden states [B, 1 + T, H] of the prefix's last position and of right-padded continuations of it."""
        first_B1H = prefix.last_hidden_H.expand(ids_BT.shape[0], 1, -1)
        if not ids_BT.shape[1]:
            return first_B1H
        cache = Cache(layers=[SharedLayer(keys, values) for keys, values in prefix.layers])
        return torch.cat([first_B1H, self._run(ids_BT, cache, prefix.num_tokens)], dim=1)

    def _run(self, ids_BT: Tensor, cache: Cache | None, start: int) -> Tensor:
        positions = {}
        if self.takes_position_ids:
            positions_T = torch.arange(start, start + ids_BT.shape[1], device=ids_BT.device)
            positions["position_ids"] = positions_T.unsqueeze(0).expand(ids_BT.shape[0], -1)
        output = self.decoder(input_ids=ids_BT, past_key_values=cache, use_cache=cache is not None, **positions)
        hidden_BTH: Tensor = output.last_hidden_state
        return hidden_BTH


def load_model(folder: Path, *, device: str, dtype: str, max_context: int) -> LoadedModel:
    """Loads and checks; `device` and `dtype` may be "auto", `max_context` 0 means the model's own.

    Raises ConfigError naming the folder and the reason.
    """
    check_folder(folder)
    # What the library has to say of a broken folder comes back as our one line; bars have no place in a log.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch_device = choose_device(device)
    dtype_name = choose_dtype(dtype, torch_device)
    vocabulary, tokenizer_eos = load_vocabulary(folder)
    model = _load_weights(folder, DTYPES[dtype_name]).to(torch_device).eval().requires_grad_(False)
    head = build_head(model)
    _check_vocabulary(folder, vocabulary, head)
    loaded = LoadedModel(
        decoder=_decoder(folder, model),
        head=head,
        vocabulary=vocabulary,
        eos_token_ids=_eos_token_ids(model, tokenizer_eos),
        max_context=_context(folder, model.config, max_context),
        device=torch_device,
        dtype_name=dtype_name,
        takes_position_ids="position_ids" in inspect.signature(model.base_model.forward).parameters,
        runs_in_threads=not _changes_in_forward(model),
    )
    check_head(folder, model, loaded)
    check_causal(folder, loaded)
    return loaded


def choose_device(name: str) -> torch.device:
    """The device asked for, or CUDA where there is one; raises ConfigError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name}: is no device; use auto, cpu or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: {torch.cuda.device_count()} CUDA devices are visible; use auto or cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> str:
    """bf16 on CUDA and fp32 elsewhere unless told; normalisers are fp32 everywhere."""
    if name == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return name


def build_head(model: Any) -> OutputHead:
    """The output head with the scale and soft-cap that the configuration declares."""
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise ConfigError(f"model type {config.model_type}: its output head is {type(layer).__name__}, not linear")
    scale = float(getattr(config, "logit_scale", None) or 1.0) * float(getattr(config, "lm_head_multiplier", 1.0))
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return OutputHead(
        weight_VH=layer.weight,
        bias_V=layer.bias,
        logit_scale=scale,
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )


def check_head(folder: Path, model: Any, loaded: LoadedModel) -> None:
    """Refuses a model whose logits our head does not reproduce on a probe."""
    ids_1T = _probe_ids(loaded)
    with torch.inference_mode():
        theirs_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
        ours_TV = loaded.head.logits(loaded.hidden(ids_1T)[0])
    difference = _largest_difference(ours_TV, theirs_TV)
    if difference > _tolerance(loaded, theirs_TV):
        declared = sorted(name for name in model.config.to_dict() if "logit" in name or "multiplier" in name)
        raise ConfigError(
            f"model={folder}: type {model.config.model_type} changes its logits in a way this engine does not know "
            f"(off by {difference:.3g} on the probe; its configuration has {', '.join(declared) or 'no such key'}); "
            "use another model"
        )


def check_causal(folder: Path, loaded: LoadedModel) -> None:
    """Refuses a model in which a position sees what stands to its right: padding would change its scores."""
    ids_1T = _probe_ids(loaded)
    num_kept = max(1, ids_1T.shape[1] // 2)
    with torch.inference_mode():
        whole_TV = loaded.head.logits(loaded.hidden(ids_1T)[0, :num_kept])
        alone_TV = loaded.head.logits(loaded.hidden(ids_1T[:, :num_kept])[0])
    # Broken weights are the canary's to report.
    is_finite = bool(whole_TV.isfinite().all() and alone_TV.isfinite().all())
    difference = float((whole_TV - alone_TV).abs().max())
    if is_finite and difference > _tolerance(loaded, alone_TV):
        raise ConfigError(
            f"model={folder}: is not causal, its logits change by {difference:.3g} with what follows; use a "
            "decoder-only language model"
        )


def can_continue(loaded: LoadedModel) -> bool:
    """Whether a prompt's keys and values are all that a continuation needs.

    Windows that slide over them, recurrent states and caches of other kinds say no: by their kind, or by a probe that
    comes out differently.
    """
    ids_1T = _probe_ids(loaded)
    num_kept = max(1, ids_1T.shape[1] // 2)
    if set(getattr(loaded.decoder.config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return False
    try:
        with torch.inference_mode():
            whole_TH, prefixes = loaded.hidden_with_prefixes(ids_1T, {0: num_kept})
            continued_TH = loaded.hidden_after(prefixes[0], ids_1T[:, num_kept:])
            expected_TV = loaded.head.logits(whole_TH[0, num_kept - 1 :])
            found_TV = loaded.head.logits(continued_TH[0])
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return _largest_difference(found_TV, expected_TV) <= _tolerance(loaded, expected_TV)


def _probe_ids(loaded: LoadedModel) -> Tensor:
    spread = torch.arange(1, _PROBE_TOKENS + 1) * 7919 % loaded.vocabulary.num_defined_ids
    return spread[: loaded.max_context].unsqueeze(0).to(loaded.device)


def _tolerance(loaded: LoadedModel, logits_TV: Tensor) -> float:
    if loaded.dtype_name == "float32":
        return _FP32_TOLERANCE
    return _FP32_TOLERANCE + _LOW_PRECISION_TOLERANCE * float(logits_TV.nan_to_num(0.0).abs().max())


def _largest_difference(ours_TV: Tensor, theirs_TV: Tensor) -> float:
    """Broken weights are the canary's to report, so NaN in the same place counts as equal."""
    both_finite = ours_TV.isfinite() & theirs_TV.isfinite()
    if not torch.equal(ours_TV.isfinite(), theirs_TV.isfinite()):
        return float("inf")
    return float((ours_TV - theirs_TV)[both_finite].abs().max()) if both_finite.any() else 0.0


def _load_weights(folder: Path, dtype: torch.dtype) -> Any:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except _LOAD_FAULTS as error:
        raise ConfigError(f"model={folder}: cannot be loaded ({first_line(error)})") from None
    missing = sorted(report["missing_keys"])
    if missing:
        # The library would fill them with random numbers and go on.
        raise ConfigError(f"model={folder}: {len(missing)} weights are missing, such as {missing[0]}; save it again")
    return model


def load_vocabulary(folder: Path) -> tuple[Vocabulary, int | None]:
    """The vocabulary and the tokenizer's EOS; raises ConfigError in one line."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except _LOAD_FAULTS as error:
        raise ConfigError(f"model={folder}: its tokenizer cannot be loaded ({first_line(error)})") from None
    return describe_vocabulary(tokenizer), tokenizer.eos_token_id


def _check_vocabulary(folder: Path, vocabulary: Vocabulary, head: OutputHead) -> None:
    if vocabulary.num_defined_ids > head.num_rows:
        raise ConfigError(
            f"model={folder}: the tokenizer defines {vocabulary.num_defined_ids} ids and the output head has only "
            f"{head.num_rows} rows; use the tokenizer the model was trained with"
        )


def _changes_in_forward(model: nn.Module) -> bool:
    """Rotary embeddings of these kinds rewrite their frequencies for the sequence at hand."""
    found = [getattr(module, "rope_type", "") for module in model.modules()]
    kinds = [kind for entry in found for kind in (entry.values() if isinstance(entry, Mapping) else [entry])]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def _decoder(folder: Path, model: Any) -> nn.Module:
    decoder = model.base_model
    if decoder is model or not isinstance(decoder, nn.Module):
        raise ConfigError(f"model={folder}: type {model.config.model_type} has no separate decoder; use another model")
    return decoder


def _eos_token_ids(model: Any, tokenizer_eos: int | None) -> tuple[int, ...]:
    declared = getattr(model.generation_config, "eos_token_id", None)
    declared = tokenizer_eos if declared is None else declared
    found = declared if isinstance(declared, list) else [] if declared is None else [declared]
    return tuple(int(token_id) for token_id in found)


def _context(folder: Path, config: Any, max_context: int) -> int:
    own = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    limits = [limit for limit in (own, max_context) if limit > 0]
    if not limits:
        raise ConfigError(f"model={folder}: does not say how long its context is; set max_context")
    return min(limits)
