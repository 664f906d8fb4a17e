"""Everything a scorer or sampler wants to know of next-token rows: normalisers, log-probs, top-k, entropy.

T rows, H hidden size, V rows of the head, K candidates, k teacher or student top-k. No gradients. A row with a
non-finite logit is marked and answered with NaN (ids -1) instead of raising, because the rows of one call may belong to
requests that have nothing to do with each other; the caller raises `NonFiniteError` for that request alone.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from opd.errors import InvalidRequestError
from opd.ops.head import OutputHead, require_defined_ids, require_temperature, row_slices
from opd.ops.moments import row_moments
from opd.ops.topk import top_k_stable
from opd.types import PAD_ID

DEFAULT_ROW_CHUNK = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class RowStatistics:
    """Answers for T rows at one temperature, log-probs over all defined ids; a field not asked for is None."""

    finite_T: Tensor
    """Bool: False where a logit of a defined id was NaN or infinite; every other field is NaN (ids -1) there."""
    normalizer_T: Tensor
    """log sum exp of the tempered logits."""
    sampled_logprobs_T: Tensor | None = None
    candidate_logprobs_TK: Tensor | None = None
    """NaN where the candidate was `PAD_ID` or no id at all."""
    topk_ids_Tk: Tensor | None = None
    """int64, most likely first, ties to the lower id, ranked in fp32."""
    topk_logprobs_Tk: Tensor | None = None
    entropy_T: Tensor | None = None
    """In nats, over all defined ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Query:
    num_defined_ids: int
    temperature: float
    score_top_k: int
    wants_entropy: bool
    sampled_ids_T: Tensor | None
    candidate_ids_TK: Tensor | None

    def check(self, num_rows: int, num_head_rows: int) -> None:
        require_defined_ids(self.num_defined_ids, num_head_rows)
        require_temperature(self.temperature)
        if not 0 <= self.score_top_k <= self.num_defined_ids:
            raise InvalidRequestError(f"score_top_k={self.score_top_k} is outside 0..{self.num_defined_ids} ids")
        for name, ids in (("sampled_ids_T", self.sampled_ids_T), ("candidate_ids_TK", self.candidate_ids_TK)):
            if ids is not None and ids.shape[0] != num_rows:
                raise InvalidRequestError(f"{name} has {ids.shape[0]} rows for {num_rows} rows of logits")


def score_rows(
    hidden_TH: Tensor,
    head: OutputHead,
    *,
    num_defined_ids: int,
    sampled_ids_T: Tensor | None = None,
    candidate_ids_TK: Tensor | None = None,
    score_top_k: int = 0,
    temperature: float = 1.0,
    wants_entropy: bool = False,
    row_chunk: int = DEFAULT_ROW_CHUNK,
) -> RowStatistics:
    """Runs the output head `row_chunk` rows at a time and answers what was asked; ids of any integer type.

    Raises `InvalidRequestError` for shapes, a temperature or a k that cannot be.
    """
    query = _Query(
        num_defined_ids=num_defined_ids,
        temperature=temperature,
        score_top_k=score_top_k,
        wants_entropy=wants_entropy,
        sampled_ids_T=sampled_ids_T,
        candidate_ids_TK=candidate_ids_TK,
    )
    query.check(hidden_TH.shape[0], head.num_rows)
    defined = head.first_rows(num_defined_ids)
    with torch.no_grad():
        parts = [_statistics(defined.logits(hidden_TH[rows]), query, rows) for rows in _slices(hidden_TH, row_chunk)]
        return _joined(parts)


def top_k_rows(
    hidden_TH: Tensor,
    head: OutputHead,
    *,
    num_defined_ids: int,
    score_top_k: int,
    temperature: float = 1.0,
    row_chunk: int = DEFAULT_ROW_CHUNK,
) -> Tensor:
    """The ids [T, k] alone that `score_rows` gives, without normalisers: about a fifth cheaper.

    A row whose best logits are not finite has `PAD_ID` throughout. Raises as `score_rows` does.
    """
    require_temperature(temperature)
    require_defined_ids(num_defined_ids, head.num_rows)
    defined = head.first_rows(num_defined_ids)
    parts = []
    with torch.no_grad():
        for rows in _slices(hidden_TH, row_chunk):
            logits_CV = defined.logits(hidden_TH[rows])
            # The same values are ranked, so that rounding makes the same ties.
            ids_Ck, kept_Ck = top_k_stable(logits_CV if temperature == 1.0 else logits_CV / temperature, score_top_k)
            parts.append(ids_Ck.masked_fill(~kept_Ck.isfinite().all(dim=-1, keepdim=True), PAD_ID))
    return torch.cat(parts)


def row_statistics(
    logits_TV: Tensor,
    *,
    num_defined_ids: int,
    sampled_ids_T: Tensor | None = None,
    candidate_ids_TK: Tensor | None = None,
    score_top_k: int = 0,
    temperature: float = 1.0,
    wants_entropy: bool = False,
    row_chunk: int = DEFAULT_ROW_CHUNK,
) -> RowStatistics:
    """The same as `score_rows` for a caller that has the logits already, which are left unchanged."""
    query = _Query(
        num_defined_ids=num_defined_ids,
        temperature=temperature,
        score_top_k=score_top_k,
        wants_entropy=wants_entropy,
        sampled_ids_T=sampled_ids_T,
        candidate_ids_TK=candidate_ids_TK,
    )
    query.check(*logits_TV.shape)
    with torch.no_grad():
        defined_TV = logits_TV[:, :num_defined_ids]
        return _joined([_statistics(defined_TV[rows], query, rows) for rows in _slices(logits_TV, row_chunk)])


def _slices(rows_T: Tensor, row_chunk: int) -> list[slice]:
    return list(row_slices(rows_T.shape[0], row_chunk))


def _statistics(logits_CV: Tensor, query: _Query, rows: slice) -> RowStatistics:
    """One chunk of C rows over the defined ids."""
    wide_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
    tempered_CV = wide_CV if query.temperature == 1.0 else wide_CV / query.temperature
    moments = row_moments(tempered_CV)
    normalizer_C = moments.normalizer_C
    finite_C = normalizer_C.isfinite()
    sampled_C = candidates_CK = ids_Ck = topk_Ck = None
    if query.sampled_ids_T is not None:
        sampled_C = logprobs_at(tempered_CV, normalizer_C, query.sampled_ids_T[rows].unsqueeze(-1)).squeeze(-1)
    if query.candidate_ids_TK is not None:
        candidates_CK = logprobs_at(tempered_CV, normalizer_C, query.candidate_ids_TK[rows])
    if query.score_top_k:
        ids_Ck, _ = top_k_stable(tempered_CV, query.score_top_k, moments.group_maxima_CG)
        topk_Ck = logprobs_at(tempered_CV, normalizer_C, ids_Ck)
        ids_Ck = ids_Ck.masked_fill(~finite_C.unsqueeze(-1), PAD_ID)
    return RowStatistics(
        finite_T=finite_C,
        normalizer_T=normalizer_C,
        sampled_logprobs_T=sampled_C,
        candidate_logprobs_TK=candidates_CK,
        topk_ids_Tk=ids_Ck,
        topk_logprobs_Tk=topk_Ck,
        entropy_T=moments.entropy_C if query.wants_entropy else None,
    )


def logprobs_at(tempered_CV: Tensor, normalizer_C: Tensor, ids_CK: Tensor) -> Tensor:
    """Log-probs [C, K] at ids; NaN, without a gradient, where the id names no column (`PAD_ID`)."""
    ids_CK = ids_CK.long()
    present_CK = (ids_CK >= 0) & (ids_CK < tempered_CV.shape[-1])
    chosen_CK = tempered_CV.gather(-1, ids_CK.masked_fill(~present_CK, 0))
    return (chosen_CK - normalizer_C.unsqueeze(-1)).masked_fill(~present_CK, torch.nan)


def _joined(parts: list[RowStatistics]) -> RowStatistics:
    if len(parts) == 1:
        return parts[0]
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(RowStatistics)}
    return RowStatistics(**{name: torch.cat(found) for name, found in columns.items() if found[0] is not None})
