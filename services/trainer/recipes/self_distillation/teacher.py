"""A teacher in the trainer's own process: the records a pool would send, from a model that is in memory.

To `TeacherClient` it is a `ScoreClient` like any other, so handshake, checks and loop are the same. A request is scored
when it is submitted, alone and in the caller's thread: no padding, no queue, nothing that could reorder. Numbers are
those of the student's side: fp32 weights, layers under bf16 autocast on CUDA, the output head in fp32.
"""

from concurrent.futures import Future

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import opd
from opd.errors import InvalidRequestError, NonFiniteError, OpdError, UnsupportedError
from opd.ops import RowStatistics, score_rows
from opd.types import PAD_ID, Capability, Floats, Ids, ScoreReply, ScoreRequest, Scores, TeacherInfo
from services.trainer.models import LoadedModel
from services.trainer.student import output_head

_CAPABILITIES = frozenset(Capability) - {Capability.HIDDEN_STATES}


class LocalTeacher:
    """Scores with `loaded.model` as it is at the moment of asking."""

    def __init__(self, loaded: LoadedModel, *, pool: str, row_chunk: int = 256) -> None:
        """`pool` is the name requests come under."""
        self.model = loaded.model
        self._row_chunk = row_chunk
        self._num_defined_ids = loaded.num_defined_ids
        self._info = describe(loaded, pool=pool)

    def info(self) -> TeacherInfo:
        return self._info

    def submit(self, request: ScoreRequest) -> Future[ScoreReply]:
        """A future that is done; it ends with an `OpdError` where a pool's would."""
        future: Future[ScoreReply] = Future()
        try:
            scores = self._score(request)
        except OpdError as error:
            future.set_exception(error)
        else:
            fingerprint = self.info().fingerprint
            future.set_result(ScoreReply(rollout_id=request.rollout_id, teacher_fingerprint=fingerprint, scores=scores))
        return future

    def close(self) -> None:
        """Nothing is open."""

    def _score(self, request: ScoreRequest) -> Scores:
        self._check(request)
        prompt, response = request.prompt_token_ids, request.response_token_ids
        rows_S = np.arange(response.size) if request.scored_rows is None else np.flatnonzero(request.scored_rows)
        hidden_RH = self._hidden(np.concatenate([prompt, response]))[prompt.size - 1 :]
        candidates = request.candidate_token_ids
        statistics = score_rows(
            hidden_RH[torch.from_numpy(rows_S).to(hidden_RH.device)],
            output_head(self.model),
            num_defined_ids=self._num_defined_ids,
            sampled_ids_T=self._to_device(response[rows_S]) if request.wants_sampled else None,
            candidate_ids_TK=None if candidates is None else self._to_device(candidates[rows_S]),
            score_top_k=request.score_top_k,
            temperature=request.teacher_temperature,
            wants_entropy=request.wants_entropy,
            row_chunk=self._row_chunk,
        )
        if not bool(statistics.finite_T.all()):
            raise NonFiniteError(f"rollout {request.rollout_id}: the teacher's logits are NaN or infinite")
        return _to_scores(statistics, rows_S, response.size)

    def _check(self, request: ScoreRequest) -> None:
        if request.wants_hidden_states:
            raise UnsupportedError("a teacher held by the trainer gives no hidden states; serve it over gRPC")
        limit = self._info.max_context
        if limit and request.num_tokens > limit:
            raise InvalidRequestError(
                f"rollout {request.rollout_id}: {request.num_tokens} tokens are above the teacher's context of "
                f"{limit}; shorten data.teacher_context or rollout.max_response_tokens"
            )

    def _hidden(self, token_ids_L: NDArray[np.int32]) -> Tensor:
        """[L - 1, H]: one row for every token that follows another."""
        inputs_1L = self._to_device(token_ids_L[None, :-1].astype(np.int64))
        is_cuda = inputs_1L.device.type == "cuda"
        with torch.no_grad(), torch.autocast(inputs_1L.device.type, dtype=torch.bfloat16, enabled=is_cuda):
            output = self.model.base_model(input_ids=inputs_1L, use_cache=False, return_dict=True)
        hidden_1LH: Tensor = output.last_hidden_state
        return hidden_1LH[0]

    def _to_device(self, ids: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids)).to(self.model.device)


def describe(loaded: LoadedModel, *, pool: str) -> TeacherInfo:
    """The handshake of a model in memory."""
    vocabulary = loaded.vocabulary
    return TeacherInfo(
        teacher=pool,
        fingerprint=loaded.fingerprint,
        model=loaded.name,
        engine="held by the trainer",
        vocab_rows=int(loaded.model.get_output_embeddings().weight.shape[0]),
        num_defined_ids=loaded.num_defined_ids,
        id_map_hash=vocabulary.id_map_hash,
        special_tokens=vocabulary.special_tokens,
        eos_token_ids=loaded.eos_token_ids,
        chat_template_hash=vocabulary.chat_template_hash,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        max_context=int(getattr(loaded.model.config, "max_position_embeddings", 0) or 0),
        max_candidates=loaded.num_defined_ids,
        max_score_top_k=loaded.num_defined_ids,
        capabilities=_CAPABILITIES,
        version=opd.__version__,
    )


def _to_scores(statistics: RowStatistics, rows_S: NDArray[np.integer], num_rows: int) -> Scores:
    def spread(values_S: Tensor | None) -> Floats | None:
        if values_S is None:
            return None
        spread_R = np.full((num_rows, *values_S.shape[1:]), np.nan, np.float32)
        spread_R[rows_S] = values_S.float().cpu().numpy()
        return spread_R

    def spread_ids(ids_S: Tensor | None) -> Ids | None:
        if ids_S is None:
            return None
        spread_R = np.full((num_rows, *ids_S.shape[1:]), PAD_ID, np.int32)
        spread_R[rows_S] = ids_S.cpu().numpy()
        return spread_R

    return Scores(
        sampled_logprobs=spread(statistics.sampled_logprobs_T),
        candidate_logprobs=spread(statistics.candidate_logprobs_TK),
        topk_token_ids=spread_ids(statistics.topk_ids_Tk),
        topk_logprobs=spread(statistics.topk_logprobs_Tk),
        entropy=spread(statistics.entropy_T),
    )
