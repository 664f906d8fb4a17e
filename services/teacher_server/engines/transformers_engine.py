"""Scoring with a Hugging Face model in this process: fp32 on CPU, bf16 with fp32 normalisers on CUDA.

B sequences, T positions, H hidden size, R response rows, S scored rows, K candidates, k top-k. The decoder runs over
rectangles of right-padded sequences; of its hidden states only the scored rows (row t predicts response token t, so it
is the state at position P - 1 + t) go through the output head, a chunk at a time and one request at a time. So a
request's scores do not depend on its neighbours, and a fault in its rows is its own. No attention mask is given: what
stands to the right of a sequence is invisible to causal attention (checked at load), and a mask of the rectangle would
cost T x T and the fast kernels.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import opd
from opd.errors import NonFiniteError, OpdError
from opd.ops import RowStatistics, score_rows
from opd.types import PAD_ID, Capability, Floats, ScoreRequest, Scores, SharedHead, TeacherInfo
from services.teacher_server.engines import model_folder
from services.teacher_server.engines.base import ForwardObserver, ForwardReport
from services.teacher_server.engines.shared_head import share_head
from services.teacher_server.engines.sub_batches import pad_right, plan_sub_batches
from services.teacher_server.engines.transformers_model import LoadedModel, load_model

CAPABILITIES = frozenset(Capability) - {Capability.HIDDEN_STATES}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """How much one call and one request may hold."""

    max_batch_tokens: int = 16_384
    """Tokens of one forward pass, padding included; a longer single request has a pass of its own."""
    max_padding_share: float = 0.25
    row_chunk: int = 256
    """Rows that go through the output head at a time."""
    max_candidates: int = 256
    max_score_top_k: int = 256
    max_message_bytes: int = 64 << 20
    serves_hidden_states: bool = False


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
        self._shared_head = share_head(model.head) if limits.serves_hidden_states else None
        self._info = _describe(model, teacher=teacher, name=name, fingerprint=fingerprint, limits=limits)
        if self._shared_head is not None:
            self._info = _with_hidden_states(self._info, model, self._shared_head)

    def info(self) -> TeacherInfo:
        """The handshake."""
        return self._info

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores | OpdError]:
        """Scores in rectangles of similar lengths; `batch_invariant` requests have one each."""
        outcomes: dict[int, Scores | OpdError] = {}
        for indices in self._plan(requests):
            together = [requests[index] for index in indices]
            outcomes |= dict(zip(indices, self._score_together(together), strict=True))
        return [outcomes[index] for index in range(len(requests))]

    def output_head(self) -> SharedHead:
        """The head's bytes, shared with the model where they lie on the host."""
        assert self._shared_head is not None
        return self._shared_head

    def close(self) -> None:
        """Gives the model's memory back."""
        del self._model
        self._shared_head = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _plan(self, requests: Sequence[ScoreRequest]) -> list[list[int]]:
        shared = [index for index, request in enumerate(requests) if not request.batch_invariant]
        alone = [[index] for index, request in enumerate(requests) if request.batch_invariant]
        lengths = [requests[index].num_tokens for index in shared]
        plan = plan_sub_batches(lengths, self._limits.max_batch_tokens, self._limits.max_padding_share)
        return alone + [[shared[place] for place in places] for places in plan]

    def _score_together(self, requests: Sequence[ScoreRequest]) -> list[Scores | OpdError]:
        started = time.perf_counter()
        # The last response token predicts nothing that is asked for, so it is never an input.
        sequences = [
            np.concatenate([request.prompt_token_ids, request.response_token_ids[:-1]]).astype(np.int32)
            for request in requests
        ]
        ids_BT = pad_right(sequences)
        with torch.inference_mode():
            hidden_BTH = self._model.hidden(torch.from_numpy(ids_BT).to(self._model.device))
            outcomes = [self._score_one(request, hidden_BTH[row]) for row, request in enumerate(requests)]
        if self._observe is not None:
            self._observe(
                ForwardReport(
                    num_requests=len(requests),
                    num_tokens=sum(sequence.size for sequence in sequences),
                    num_padded_tokens=ids_BT.size,
                    duration_s=time.perf_counter() - started,
                )
            )
        return outcomes

    def _score_one(self, request: ScoreRequest, hidden_TH: Tensor) -> Scores | OpdError:
        num_response, device = request.response_token_ids.size, hidden_TH.device
        scored_R = np.ones(num_response, np.bool_) if request.scored_rows is None else request.scored_rows
        rows_S = np.flatnonzero(scored_R)
        positions_S = torch.from_numpy(rows_S + request.prompt_token_ids.size - 1).to(device)
        candidates_RK = request.candidate_token_ids
        statistics = score_rows(
            hidden_TH[positions_S],
            self._model.head,
            num_defined_ids=self._model.vocabulary.num_defined_ids,
            sampled_ids_T=_to_device(request.response_token_ids[rows_S], device) if request.wants_sampled else None,
            candidate_ids_TK=_to_device(candidates_RK[rows_S], device) if candidates_RK is not None else None,
            score_top_k=request.score_top_k,
            temperature=request.teacher_temperature,
            wants_entropy=request.wants_entropy,
            row_chunk=self._limits.row_chunk,
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
        return replace(scores, hidden_states=_spread(hidden_TH[positions_S], rows_S, num_response))


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
