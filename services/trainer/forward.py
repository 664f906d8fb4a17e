"""The student's layers over the documents of a micro-batch: packed where its architecture allows it, else padded.

N tokens of all documents, [G, S] a group of them, H hidden size. Which of the two is decided once, by declaration and
by trial: two short documents have to give the same hidden states in one row as they give alone. Either way a document's
hidden states are those it has alone, to rounding.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd.errors import UnsupportedError
from services.trainer.memory import is_out_of_memory
from services.trainer.packed_attention import expected_windows, inside_documents, why_not_packable
from services.trainer.packing import Group, PackedTokens

_log = logging.getLogger(__name__)
_PROBE_LENGTHS = (5, 3)
_PROBE_TOLERANCE = 1e-3


class DocumentForward:
    """Hidden states of a transformers model, one document knowing nothing of another."""

    def __init__(
        self,
        model: Any,
        *,
        num_defined_ids: int,
        decoder: Callable[..., Any] | None = None,
        in_one_pass: bool = False,
    ) -> None:
        """Tries the model on a few tokens. `decoder` runs its layers, by default the model's own.

        `in_one_pass` runs every micro-batch once also where it is padded, however much that is: for processes that
        have to run their layers in step with each other.
        """
        self._model = model
        self._decoder = decoder or model.base_model
        self._in_one_pass = in_one_pass
        self._config = model.config.get_text_config(decoder=True)
        reason = why_not_packable(self._config) or self._why_probe_fails(num_defined_ids)
        self.is_packed = reason is None
        """Whether the layers see a micro-batch as one row."""
        if reason is not None:
            name = self._config.model_type
            _log.warning("model_type=%s is trained on padded groups instead of packed rows: %s", name, reason)

    def __call__(self, tokens: PackedTokens) -> Tensor:
        """[N, H], differentiable; in the mode and under the autocast of the caller."""
        if self.is_packed:
            return self._packed(tokens)[0]
        groups = (tokens.as_one_group(),) if self._in_one_pass else tokens.groups
        return torch.cat([self._padded(tokens, group) for group in groups])

    def num_places(self, tokens: PackedTokens) -> int:
        """At which attention is computed for them, those after the end of a document included."""
        if self._in_one_pass and not self.is_packed:
            group = tokens.as_one_group()
            return group.num_documents * group.longest
        return tokens.num_places

    def _packed(self, tokens: PackedTokens) -> tuple[Tensor, list[int | None]]:
        input_ids, position_ids, sharing = tokens.input_ids_N, tokens.position_ids_N, tokens.sharing
        if sharing is not None:
            input_ids, position_ids = sharing.kept(input_ids), sharing.kept(position_ids)
        with inside_documents(self._config, tokens) as windows:
            hidden_1UH = self._run(input_ids=input_ids[None], position_ids=position_ids[None], attention_mask=None)
        return hidden_1UH[0] if sharing is None else sharing.spread(hidden_1UH[0]), windows

    def _padded(self, tokens: PackedTokens, group: Group) -> Tensor:
        hidden_GSH = self._run(
            input_ids=group.padded(tokens.input_ids_N),
            attention_mask=group.padded(torch.ones_like(tokens.input_ids_N)),
        )
        return group.packed(hidden_GSH)

    def _run(self, **inputs: Tensor | None) -> Tensor:
        hidden: Tensor = self._decoder(**inputs, use_cache=False, return_dict=True).last_hidden_state
        return hidden

    def _why_probe_fails(self, num_defined_ids: int) -> str | None:
        ids = torch.arange(sum(_PROBE_LENGTHS), device=self._model.device) % num_defined_ids
        tokens = PackedTokens(input_ids_N=ids, lengths=_PROBE_LENGTHS, hidden_index_T=ids[:0])
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                found_NH, windows = self._packed(tokens)
                expected_NH = torch.cat([self._run(input_ids=part[None])[0] for part in ids.split(_PROBE_LENGTHS)])
        except (UnsupportedError, TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            return str(error).partition("\n")[0]
        finally:
            self._model.train(was_training)
        if windows != expected_windows(self._config):
            return "its layers do not attend as its configuration declares"
        worst = float((found_NH - expected_NH).abs().max())
        # NaN weights compare false and are reported by the first rollout, with its name.
        if worst > _PROBE_TOLERANCE * max(1.0, float(expected_NH.abs().max())):
            return f"hidden states change by {worst:.3g} with a neighbour in the row"
        return None
