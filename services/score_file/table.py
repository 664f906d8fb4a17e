"""Scored rows as Arrow columns; docs/offline-scoring.md explains each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from opd.types import Scores
from services.score_file.rows import InputRow
from services.score_file.settings import ScoreFileSettings

_IDS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputRow:
    """One row and its answer; no scores where it was not asked for or could not be scored."""

    row: InputRow
    status: str
    reason: str | None
    scores: Scores | None


def schema(settings: ScoreFileSettings) -> pa.Schema:
    """Columns of the output; k stands in the type of the teacher's top-k."""
    fields = [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("content_key", pa.binary(32), nullable=False),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("response_token_ids", _IDS, nullable=False),
        pa.field("sampled_logprobs", _FLOATS),
    ]
    if settings.score_top_k:
        fields += [
            pa.field("topk_token_ids", pa.list_(pa.list_(pa.int32(), settings.score_top_k))),
            pa.field("topk_logprobs", pa.list_(pa.list_(pa.float32(), settings.score_top_k))),
        ]
    if settings.wants_entropy:
        fields.append(pa.field("entropy", _FLOATS))
    if settings.candidates_column:
        fields += [
            pa.field("candidate_token_ids", pa.list_(_IDS)),
            pa.field("candidate_logprobs", pa.list_(_FLOATS)),
        ]
    return pa.schema(fields)


def build_table(rows: Sequence[OutputRow], settings: ScoreFileSettings) -> pa.Table:
    """One part."""
    wanted = schema(settings)
    columns: dict[str, Any] = {
        "row": [item.row.index for item in rows],
        "status": [item.status for item in rows],
        "reason": [item.reason for item in rows],
        "content_key": [item.row.key for item in rows],
        "num_prompt_tokens": [int(item.row.request.prompt_token_ids.size) for item in rows],
        "response_token_ids": [item.row.request.response_token_ids for item in rows],
    }
    for name in ("sampled_logprobs", "topk_token_ids", "topk_logprobs", "entropy", "candidate_logprobs"):
        columns[name] = [None if item.scores is None else getattr(item.scores, name) for item in rows]
    columns["candidate_token_ids"] = [item.scores and item.row.request.candidate_token_ids for item in rows]
    return pa.Table.from_arrays([_column(columns[field.name], field.type) for field in wanted], schema=wanted)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    lengths = [0 if value is None else len(value) for value in values]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    present = [value for value in values if value is not None]
    missing = pa.array([value is None for value in values], pa.bool_())
    return pa.ListArray.from_arrays(offsets, _flat(present, kind.value_type), type=kind, mask=missing)


def _flat(arrays: list[Any], kind: pa.DataType) -> pa.Array:
    """The elements of all arrays one after the other: numbers, or rows of fixed or of varying width."""
    if pa.types.is_fixed_size_list(kind):
        numbers = _flat([array.reshape(-1) for array in arrays], kind.value_type)
        return pa.FixedSizeListArray.from_arrays(numbers, type=kind)
    if pa.types.is_list(kind):
        return _column([row for array in arrays for row in array], kind)
    dtype = kind.to_pandas_dtype()
    return pa.array(np.concatenate(arrays) if arrays else np.empty(0, dtype), kind)
