"""Scoring with a Hugging Face model in this process: fp32 on CPU, bf16 with fp32 normalisers on CUDA.

B sequences, P prompt tokens, T positions, H hidden size, R response rows, S scored rows, K candidates, k top-k. The
decoder runs over rectangles of right-padded sequences, or over the responses to one prompt that was computed before; of
its hidden states only the scored rows (row t predicts response token t, so it is the state at position P - 1 + t) go
through the output head, a chunk at a time and one request at a time. So a request's scores do not depend on its
neighbours, and a fault in its rows is its own. No attention mask is given: what stands to the right of a sequence is
invisible to causal attention (checked at load), and a mask of the rectangle would cost T x T and the fast kernels.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import opd
from opd.errors import NonFiniteError, OpdError
from opd.ops import RowStatistics, score_rows
from opd.types import PAD_ID, Capability, Floats, Ids, ScoreRequest, Scores, SharedHead, TeacherInfo
from services.teacher_server.engines import model_folder
from services.teacher_server.engines.base import ForwardObserver, ForwardReport
from services.teacher_server.engines.pass_workers import PassWorkers
from services.teacher_server.engines.passes import (
    PassLimits,
    Plan,
    Siblings,
    num_passes_at_once,
    pad_right,
    plan_passes,
)
from services.teacher_server.engines.prefix_cache import Prefix, PrefixCache, prompt_key
from services.teacher_server.engines.shared_head import share_head
from services.teacher_server.engines.transformers_model import LoadedModel, can_continue, load_model

CAPABILITIES = frozenset(Capability) - {Capability.HIDDEN_STATES}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """How much one call and one request may hold."""

    max_batch_tokens: int = 16_384
    """Tokens of one forward pass, padding included; a longer single request has a pass of its own."""
    max_padding_share: float = 0.1
    row_chunk: int = 256
    """Rows that go through the output head at a time, in all passes together."""
    max_candidates: int = 256
    max_score_top_k: int = 256
    max_message_bytes: int = 64 << 20
    serves_hidden_states: bool = False
    prefix_cache_tokens: int = 16_384
    """Of prompts kept for later requests; 0 keeps none."""


_MIN_SAVED_TOKENS = {"cpu": 64, "cuda": 1024}
"""A pass of its own costs launches and small products: on a CPU little, on a CUDA device (not measured) much."""


class TransformersEngine:
    """A `ScoringEngine` over a loaded model."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        teacher: str,
        name: str,
        fingerprint: str,
        limits: EngineLimits,
        observe: ForwardObserver | None = None,
    ) -> None:
        self._model = model
        self._limits = limits
        self._observe = observe
        self._prefixes = PrefixCache(limits.prefix_cache_tokens)
        self._shares_prompts = limits.prefix_cache_tokens > 0 and can_continue(model)
        self._workers = PassWorkers()
        self._shared_head = share_head(model.head) if limits.serves_hidden_states else None
        self._info = _describe(model, teacher=teacher, name=name, fingerprint=fingerprint, limits=limits)
        if self._shared_head is not None:
            self._info = _with_hidden_states(self._info, model, self._shared_head)

    def info(self) -> TeacherInfo:
        """The handshake."""
        return self._info

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores | OpdError]:
        """Scores in rectangles of similar lengths, siblings after their prompt; `batch_invariant` requests alone."""
        num_workers = self._num_workers(requests)
        row_chunk = max(1, self._limits.row_chunk // num_workers)
        plan = self._plan(requests, num_workers)
        outcomes: dict[int, Scores | OpdError] = {}
        with torch.inference_mode():
            for index in plan.alone:
                outcomes |= self._score_whole(requests, [index], self._limits.row_chunk)
            prefixes = {siblings.key: self._prefix(siblings, requests) for siblings in plan.siblings}
            passes = [partial(self._score_whole, requests, indices, row_chunk) for indices in plan.rectangles]
            passes += [
                partial(self._score_siblings, requests, indices, row_chunk, prefix=prefixes[siblings.key])
                for siblings in plan.siblings
                for indices in siblings.rectangles
            ]
            for found in self._workers.run(passes, num_workers):
                outcomes |= found
        return [outcomes[index] for index in range(len(requests))]

    def output_head(self) -> SharedHead:
        """The head's bytes, shared with the model where they lie on the host."""
        assert self._shared_head is not None
        return self._shared_head

    def forget(self) -> None:
        """Prompts are computed anew from now on."""
        self._prefixes.clear()

    def close(self) -> None:
        """Gives the model's memory back."""
        self._workers.close()
        self._prefixes.clear()
        del self._model
        self._shared_head = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _num_workers(self, requests: Sequence[ScoreRequest]) -> int:
        if self._model.device.type != "cpu" or not self._model.runs_in_threads:
            return 1
        lengths = [request.num_tokens for request in requests if not request.batch_invariant]
        return num_passes_at_once(lengths, torch.get_num_threads())

    def _plan(self, requests: Sequence[ScoreRequest], num_workers: int) -> Plan:
        limits = PassLimits(
            max_tokens=self._limits.max_batch_tokens,
            max_padding_share=self._limits.max_padding_share,
            min_saved_tokens=_MIN_SAVED_TOKENS.get(self._model.device.type, 0),
            num_workers=num_workers,
        )
        return plan_passes(requests, limits, self._prefixes.__contains__ if self._shares_prompts else None)

    def _score_whole(
        self, requests: Sequence[ScoreRequest], indices: Sequence[int], row_chunk: int
    ) -> dict[int, Scores | OpdError]:
        """One rectangle of prompts and responses, whose prompts are kept for siblings that may follow."""
        together = [requests[index] for index in indices]
        # The last response token predicts nothing that is asked for, so it is never an input.
        sequences = [
            np.concatenate([request.prompt_token_ids, request.response_token_ids[:-1]]).astype(np.int32)
            for request in together
        ]
        with self._observed(together, sequences) as ids_BT:
            hidden_BTH = self._hidden_keeping_prompts(together, ids_BT)
            return {
                index: self._score_one(request, hidden_TH[request.prompt_token_ids.size - 1 :], row_chunk)
                for index, request, hidden_TH in zip(indices, together, hidden_BTH, strict=True)
            }

    def _hidden_keeping_prompts(self, requests: Sequence[ScoreRequest], ids_BT: Tensor) -> Tensor:
        if not self._shares_prompts or requests[0].batch_invariant:
            return self._model.hidden(ids_BT)
        keys = {prompt_key(request.prompt_token_ids): row for row, request in enumerate(requests)}
        new = {row: key for key, row in keys.items() if key not in self._prefixes}
        sizes = {row: requests[row].prompt_token_ids.size for row in new}
        hidden_BTH, prefixes = self._model.hidden_with_prefixes(ids_BT, sizes)
        for row, prefix in prefixes.items():
            self._prefixes.put(new[row], prefix)
        return hidden_BTH

    def _score_siblings(
        self, requests: Sequence[ScoreRequest], indices: Sequence[int], row_chunk: int, *, prefix: Prefix
    ) -> dict[int, Scores | OpdError]:
        """One rectangle of responses to one prompt, after it."""
        together = [requests[index] for index in indices]
        sequences = [request.response_token_ids[:-1] for request in together]
        with self._observed(together, sequences, num_reused_tokens=prefix.num_tokens * len(indices)) as ids_BT:
            hidden_BRH = self._model.hidden_after(prefix, ids_BT)
            return {
                index: self._score_one(request, hidden_RH, row_chunk)
                for index, request, hidden_RH in zip(indices, together, hidden_BRH, strict=True)
            }

    def _prefix(self, siblings: Siblings, requests: Sequence[ScoreRequest]) -> Prefix:
        """Of the siblings' prompt, computed where it is not kept."""
        prefix = self._prefixes.get(siblings.key)
        if prefix is None:
            prompt = requests[siblings.rectangles[0][0]].prompt_token_ids
            with self._observed([], [prompt]) as ids_1P:
                _, prefixes = self._model.hidden_with_prefixes(ids_1P, {0: prompt.size})
            prefix = prefixes[0]
            self._prefixes.put(siblings.key, prefix)
        return prefix

    @contextmanager
    def _observed(
        self, requests: Sequence[ScoreRequest], sequences: Sequence[Ids], *, num_reused_tokens: int = 0
    ) -> Iterator[Tensor]:
        """Gives the sequences as ids [B, T] on the device; tells the observer of the pass when it is done."""
        started, ids_BT = time.perf_counter(), pad_right(sequences)
        yield torch.from_numpy(ids_BT).to(self._model.device)
        if self._observe is not None:
            self._observe(
                ForwardReport(
                    num_requests=len(requests),
                    num_tokens=sum(sequence.size for sequence in sequences),
                    num_padded_tokens=ids_BT.size,
                    duration_s=time.perf_counter() - started,
                    num_reused_tokens=num_reused_tokens,
                )
            )

    def _score_one(self, request: ScoreRequest, hidden_RH: Tensor, row_chunk: int) -> Scores | OpdError:
        """Of the states from the prompt's last position on; what follows the response's is padding."""
        num_response, device = request.response_token_ids.size, hidden_RH.device
        scored_R = np.ones(num_response, np.bool_) if request.scored_rows is None else request.scored_rows
        rows_S = np.flatnonzero(scored_R)
        candidates_RK = request.candidate_token_ids
        hidden_SH = hidden_RH[torch.from_numpy(rows_S).to(device)]
        statistics = score_rows(
            hidden_SH,
            self._model.head,
            num_defined_ids=self._model.vocabulary.num_defined_ids,
            sampled_ids_T=_to_device(request.response_token_ids[rows_S], device) if request.wants_sampled else None,
            candidate_ids_TK=_to_device(candidates_RK[rows_S], device) if candidates_RK is not None else None,
            score_top_k=request.score_top_k,
            temperature=request.teacher_temperature,
            wants_entropy=request.wants_entropy,
            row_chunk=row_chunk,
        )
        finite_S = statistics.finite_T.cpu().numpy()
        if not finite_S.all():
            return NonFiniteError(
                f"rollout {request.rollout_id}: the teacher's logits are NaN or infinite at {int((~finite_S).sum())} "
                f"of {finite_S.size} scored positions, first at {rows_S[np.argmin(finite_S)]}; no score is exact there"
            )
        scores = _to_scores(statistics, rows_S, num_response)
        if not request.wants_hidden_states:
            return scores
        return replace(scores, hidden_states=_spread(hidden_SH, rows_S, num_response))


def load_engine(
    model: str,
    *,
    teacher: str,
    device: str,
    dtype: str,
    max_context: int,
    limits: EngineLimits,
    cache_folder: Path | None = None,
    observe: ForwardObserver | None = None,
) -> TransformersEngine:
    """Finds, checks, loads and identifies a model; raises ConfigError in one line for whatever the user got wrong."""
    folder = model_folder.resolve_folder(model)
    weights = model_folder.hash_weights(model_folder.check_folder(folder), cache_folder)
    loaded = load_model(folder, device=device, dtype=dtype, max_context=max_context)
    return TransformersEngine(
        loaded,
        teacher=teacher,
        name=model_folder.model_name(model),
        fingerprint=model_folder.fingerprint(
            weights, model_folder.hash_configuration(folder), loaded.vocabulary.id_map_hash, loaded.dtype_name
        ),
        limits=limits,
        observe=observe,
    )


def _describe(model: LoadedModel, *, teacher: str, name: str, fingerprint: str, limits: EngineLimits) -> TeacherInfo:
    vocabulary = model.vocabulary
    return TeacherInfo(
        teacher=teacher,
        fingerprint=fingerprint,
        model=name,
        engine="transformers",
        vocab_rows=model.head.num_rows,
        num_defined_ids=vocabulary.num_defined_ids,
        id_map_hash=vocabulary.id_map_hash,
        special_tokens=vocabulary.special_tokens,
        eos_token_ids=model.eos_token_ids,
        chat_template_hash=vocabulary.chat_template_hash,
        dtype=model.dtype_name,
        max_context=model.max_context,
        max_candidates=limits.max_candidates,
        max_score_top_k=min(limits.max_score_top_k, vocabulary.num_defined_ids),
        max_batch_tokens=limits.max_batch_tokens,
        max_message_bytes=limits.max_message_bytes,
        capabilities=CAPABILITIES,
        version=opd.__version__,
    )


def _with_hidden_states(info: TeacherInfo, model: LoadedModel, shared: SharedHead) -> TeacherInfo:
    """What one needs to make logits of hidden states; `check_head` has compared just this with the model's own."""
    return replace(
        info,
        capabilities=info.capabilities | {Capability.HIDDEN_STATES},
        hidden_size=shared.shape[1],
        output_head_hash=shared.sha256,
        logit_scale=model.head.logit_scale,
        logit_softcap=model.head.soft_cap,
    )


def _to_device(ids: NDArray[np.int32], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(ids)).to(device)


def _to_scores(statistics: RowStatistics, rows_S: NDArray[np.int64], num_rows: int) -> Scores:
    return Scores(
        sampled_logprobs=_spread(statistics.sampled_logprobs_T, rows_S, num_rows),
        candidate_logprobs=_spread(statistics.candidate_logprobs_TK, rows_S, num_rows),
        topk_token_ids=_spread_ids(statistics.topk_ids_Tk, rows_S, num_rows),
        topk_logprobs=_spread(statistics.topk_logprobs_Tk, rows_S, num_rows),
        entropy=_spread(statistics.entropy_T, rows_S, num_rows),
    )


def _spread(values_S: Tensor | None, rows_S: NDArray[np.int64], num_rows: int) -> Floats | None:
    """Scored rows at their places among all response rows, NaN elsewhere."""
    if values_S is None:
        return None
    spread_R = np.full((num_rows, *values_S.shape[1:]), np.nan, np.float32)
    spread_R[rows_S] = values_S.float().cpu().numpy()
    return spread_R


def _spread_ids(ids_S: Tensor | None, rows_S: NDArray[np.int64], num_rows: int) -> NDArray[np.int32] | None:
    if ids_S is None:
        return None
    spread_R = np.full((num_rows, *ids_S.shape[1:]), PAD_ID, np.int32)
    spread_R[rows_S] = ids_S.cpu().numpy()
    return spread_R


def set_threads(num_threads: int) -> None:
    """How many threads torch computes with; 0 leaves one core to the event loop.

    `OMP_NUM_THREADS`, where it is set, is somebody's decision already. Call it in the thread that scores.
    """
    if num_threads == 0:
        if os.environ.get("OMP_NUM_THREADS"):
            return
        num_threads = max(1, len(os.sched_getaffinity(0)) - 1)
    torch.set_num_threads(num_threads)
