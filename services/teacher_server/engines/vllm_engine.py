"""Scoring with vLLM in this process: sampled log-probs and teacher top-k, and candidates where its runner takes them.

R response rows, K candidates, k top-k, N ids ranked by vLLM. vLLM batches by itself, in pieces of
`vllm.max_num_batched_tokens`. What it does not compute exactly it does not claim: no entropy, no teacher temperature
other than 1, candidate ids only with the V2 model runner (docs/vllm.md says where that is at work).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import opd
from opd.errors import NonFiniteError, OpdError, UnsupportedError
from opd.types import PAD_ID, Floats, Ids, ScoreRequest, Scores, SharedHead, TeacherInfo
from services.teacher_server.config import TeacherConfig
from services.teacher_server.engines import model_folder
from services.teacher_server.engines.base import ForwardObserver, ForwardReport
from services.teacher_server.engines.vllm_model import LoadedVllm, clear_cache, load_vllm, stop_vllm
from services.teacher_server.engines.vllm_requests import VllmRows, VllmRun, run_together

# One more than asked for shows whether the last place is tied; a few more settle most ties at once.
_TIE_MARGIN = 4


class VllmEngine:
    """A `ScoringEngine` over a model that vLLM serves."""

    def __init__(self, model: LoadedVllm, info: TeacherInfo, observe: ForwardObserver | None = None) -> None:
        self._model = model
        self._info = info
        self._observe = observe

    def info(self) -> TeacherInfo:
        """The handshake."""
        return self._info

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores | OpdError]:
        """Scores all together, `batch_invariant` requests alone."""
        alone = [{index: request} for index, request in enumerate(requests) if request.batch_invariant]
        shared = {index: request for index, request in enumerate(requests) if not request.batch_invariant}
        outcomes: dict[int, Scores | OpdError] = {}
        for together in [*alone, shared]:
            outcomes |= self._score_apart_from_nan(together)
        return [outcomes[index] for index in range(len(requests))]

    def forget(self) -> None:
        """Clears the keys and values that vLLM would use again."""
        clear_cache(self._model.engine)

    def output_head(self) -> SharedHead:
        """Not supplied, as the capabilities say."""
        raise UnsupportedError("output head: the vllm engine does not supply it; ask a teacher on transformers")

    def close(self) -> None:
        """Ends vLLM and its workers."""
        stop_vllm(self._model.engine)
        del self._model

    def _score_apart_from_nan(self, requests: Mapping[int, ScoreRequest]) -> dict[int, Scores | OpdError]:
        """Whoever comes out as NaN is scored again alone, in a clean cache, so that the NaN is its own.

        vLLM hands on the memory of finished sequences as it is. Attention weighs what lies behind a sequence with zero,
        and zero times the NaN that a former one left there is NaN.
        """
        outcomes = self._score_together(requests)
        suspects = [index for index, outcome in outcomes.items() if isinstance(outcome, NonFiniteError)]
        for index in suspects:
            clear_cache(self._model.engine)
            outcomes |= self._score_together({index: requests[index]})
        if suspects:
            clear_cache(self._model.engine)
        return outcomes

    def _score_together(self, requests: Mapping[int, ScoreRequest]) -> dict[int, Scores | OpdError]:
        outcomes: dict[int, Scores | OpdError] = {}
        widths = {index: self._first_width(request.score_top_k) for index, request in requests.items()}
        while widths:
            runs = {index: plan_run(requests[index], width) for index, width in widths.items()}
            tied: dict[int, int] = {}
            for index, rows in self._observed(runs):
                if isinstance(rows, OpdError):
                    outcomes[index] = rows
                elif is_tied_beyond(rows, requests[index], self._info.num_defined_ids):
                    tied[index] = min(2 * widths[index], self._info.num_defined_ids)
                else:
                    outcomes[index] = to_scores(rows, requests[index])
            widths = tied
        return outcomes

    def _first_width(self, score_top_k: int) -> int:
        return min(score_top_k + _TIE_MARGIN, self._info.num_defined_ids) if score_top_k else 0

    def _observed(self, runs: Mapping[int, VllmRun]) -> Iterator[tuple[int, VllmRows | OpdError]]:
        """Tells the observer of every finished run: a long batch is seen to get on."""
        started = time.perf_counter()
        for index, rows in run_together(self._model.engine, runs):
            if self._observe is not None:
                num_tokens, now = int(runs[index].token_ids.size), time.perf_counter()
                self._observe(
                    ForwardReport(
                        num_requests=1,
                        num_tokens=num_tokens,
                        num_padded_tokens=num_tokens,
                        duration_s=now - started,
                    )
                )
                started = now
            yield index, rows


def plan_run(request: ScoreRequest, width: int) -> VllmRun:
    """What vLLM is asked; the response's own log-probs come with the ranked ids, or as the first fixed id."""
    fixed_RK = None
    if request.candidate_token_ids is not None:
        sampled_R1 = request.response_token_ids[:, None]
        fixed_RK = np.concatenate([sampled_R1, request.candidate_token_ids], axis=1).astype(np.int32)
    return VllmRun(
        token_ids=np.concatenate([request.prompt_token_ids, request.response_token_ids]).astype(np.int32),
        first_row=int(request.prompt_token_ids.size) - 1,
        width=None if fixed_RK is not None and not width else width,
        fixed_ids_RK=fixed_RK,
    )


def is_tied_beyond(rows: VllmRows, request: ScoreRequest, num_defined_ids: int) -> bool:
    """Whether a scored row's k-th place is tied with the last id given: one that was left out may be lower."""
    k, num_ranked = request.score_top_k, rows.ranked_ids_RN.shape[1]
    if not k or num_ranked >= num_defined_ids:
        return False
    logprobs_SN = rows.ranked_logprobs_RN[_scored(request)]
    return bool((logprobs_SN[:, k - 1] == logprobs_SN[:, -1]).any())


def to_scores(rows: VllmRows, request: ScoreRequest) -> Scores | OpdError:
    """Scores with NaN where nothing was to be scored; a NonFiniteError where a scored row is NaN or infinite."""
    scored_R, k = _scored(request), request.score_top_k
    fixed_RK = rows.fixed_logprobs_RK
    sampled_R = rows.sampled_logprobs_R if fixed_RK is None else fixed_RK[:, 0]
    order_RN = np.lexsort((rows.ranked_ids_RN, -rows.ranked_logprobs_RN), axis=1)[:, :k]
    topk_logprobs_Rk = np.take_along_axis(rows.ranked_logprobs_RN, order_RN, axis=1)
    finite_S = np.isfinite(sampled_R[scored_R]) & np.isfinite(topk_logprobs_Rk[scored_R]).all(axis=1)
    if not finite_S.all():
        first = np.flatnonzero(scored_R)[np.argmin(finite_S)]
        return NonFiniteError(
            f"rollout {request.rollout_id}: the teacher's log-probs are NaN or infinite at {int((~finite_S).sum())} "
            f"of {finite_S.size} scored positions, first at {first}; no score is exact there"
        )
    candidates_RK = request.candidate_token_ids
    return Scores(
        sampled_logprobs=_mask(sampled_R, scored_R) if request.wants_sampled else None,
        candidate_logprobs=(
            _mask(np.where(candidates_RK == PAD_ID, np.nan, fixed_RK[:, 1:]), scored_R)
            if candidates_RK is not None and fixed_RK is not None
            else None
        ),
        topk_token_ids=_mask_ids(np.take_along_axis(rows.ranked_ids_RN, order_RN, axis=1), scored_R) if k else None,
        topk_logprobs=_mask(topk_logprobs_Rk, scored_R) if k else None,
    )


def load_vllm_engine(config: TeacherConfig, observe: ForwardObserver | None = None) -> VllmEngine:
    """Finds, checks, loads, probes and identifies a model; raises ConfigError in one line."""
    folder = model_folder.resolve_folder(config.model)
    cache_folder = config.cache_folder.expanduser() if config.cache_folder else None
    weights = model_folder.hash_weights(model_folder.check_folder(folder), cache_folder)
    model = load_vllm(
        folder,
        device=config.device,
        dtype=config.dtype,
        max_context=config.max_context,
        max_candidates=config.max_candidates,
        settings=config.vllm,
    )
    parts = [weights, model_folder.hash_configuration(folder), model.vocabulary.id_map_hash, model.dtype_name]
    # As the other engine's of the same folder and dtype; weights that are quantised on loading are other weights.
    parts += [f"quantization={config.vllm.quantization}"] if config.vllm.quantization else []
    return VllmEngine(model, _describe(config, model, model_folder.fingerprint(*parts)), observe)


def _describe(config: TeacherConfig, model: LoadedVllm, fingerprint: str) -> TeacherInfo:
    vocabulary = model.vocabulary
    return TeacherInfo(
        teacher=config.teacher,
        fingerprint=fingerprint,
        model=model_folder.model_name(config.model),
        engine="vllm",
        vocab_rows=model.vocab_rows,
        num_defined_ids=vocabulary.num_defined_ids,
        id_map_hash=vocabulary.id_map_hash,
        special_tokens=vocabulary.special_tokens,
        eos_token_ids=model.eos_token_ids,
        chat_template_hash=vocabulary.chat_template_hash,
        dtype=model.dtype_name,
        max_context=model.max_context,
        max_candidates=config.max_candidates,
        max_score_top_k=min(config.max_score_top_k, vocabulary.num_defined_ids),
        max_batch_tokens=config.batching.max_batch_tokens,
        max_message_bytes=config.grpc.max_message_bytes,
        capabilities=model.capabilities,
        version=opd.__version__,
    )


def _scored(request: ScoreRequest) -> NDArray[np.bool_]:
    return np.ones(request.response_token_ids.size, np.bool_) if request.scored_rows is None else request.scored_rows


def _mask(values_R: NDArray[Any], scored_R: NDArray[np.bool_]) -> Floats:
    masked_R = np.full(values_R.shape, np.nan, np.float32)
    masked_R[scored_R] = values_R[scored_R]
    return masked_R


def _mask_ids(ids_Rk: Ids, scored_R: NDArray[np.bool_]) -> Ids:
    masked_Rk = np.full(ids_Rk.shape, PAD_ID, np.int32)
    masked_Rk[scored_R] = ids_Rk[scored_R]
    return masked_Rk
