"""A long reply as a stream of row blocks, and the reply again; R rows of the response.

Every message is a `ScoreReply` of consecutive rows, the last one says so. Putting together trusts nothing: rows must
come in order and be exactly the R that were asked for, every block must have the fields, widths, fingerprint and
replica of the first, so that memory is bounded by R times the width of one block's row.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd.errors import InternalError, NonFiniteError, TeacherUnavailableError
from opd.types import Encoding, ScoreReply, ScoreRequest, Scores
from opd.wire.messages import reply_from_proto, reply_to_proto
from opd.wire.pb import teacher_pb2 as pb

_FIELDS = tuple(field.name for field in fields(Scores))


def split_reply(reply: ScoreReply, encoding: Encoding, chunk_bytes: int) -> Iterator[pb.ScoreStreamResponse]:
    """Messages whose arrays hold at most `chunk_bytes`, or one row where a row is longer."""
    columns = _columns(reply.scores)
    num_rows = max((len(column) for column in columns.values()), default=0)
    # As float32 and int32, which no encoding exceeds.
    row_bytes = sum(4 * int(np.prod(column.shape[1:])) for column in columns.values())
    step = max(1, chunk_bytes // max(row_bytes, 1))
    for first_row in range(0, num_rows, step):
        rows = slice(first_row, first_row + step)
        block = replace(reply, scores=Scores(**{name: column[rows] for name, column in columns.items()}))
        yield pb.ScoreStreamResponse(
            first_row=first_row, reply=reply_to_proto(block, encoding), is_last=first_row + step >= num_rows
        )


class ReplyAssembly:
    """Takes the messages of one stream in order; `finish` gives the reply they make."""

    def __init__(self, request: ScoreRequest) -> None:
        self._request = request
        self._num_rows = int(request.response_token_ids.size)
        self._head: ScoreReply | None = None
        self._columns: dict[str, NDArray[Any]] = {}
        self._num_filled = 0
        self._is_done = False

    def add(self, message: pb.ScoreStreamResponse) -> None:
        """Raises the OpdError that travelled in a refusal, and InternalError for rows that do not fit."""
        reply = reply_from_proto(message.reply)
        blocks = _columns(reply.scores)
        sizes = {len(block) for block in blocks.values()}
        num_rows = sizes.pop() if len(sizes) == 1 else 0
        if self._is_done or message.first_row != self._num_filled or not num_rows:
            raise self._misfit(f"rows {message.first_row}+{num_rows} came after {self._num_filled}")
        if self._num_filled + num_rows > self._num_rows:
            raise self._misfit(f"row {self._num_filled + num_rows} came, {self._num_rows} were asked for")
        if self._head is None:
            self._begin(reply, blocks)
        self._check_alike(reply, blocks)
        for name, block in blocks.items():
            self._columns[name][self._num_filled : self._num_filled + num_rows] = block
        self._num_filled += num_rows
        self._is_done = message.is_last

    def finish(self) -> ScoreReply:
        """The whole reply.

        Raises TeacherUnavailableError, which is worth a retry, when the stream was cut, InternalError when what was
        asked for did not come, and NonFiniteError for hidden states that are no numbers.
        """
        if self._head is None or not self._is_done or self._num_filled != self._num_rows:
            raise TeacherUnavailableError(
                f"rollout {self._request.rollout_id}: the stream ended after {self._num_filled} of {self._num_rows} "
                "rows; ask again"
            )
        self._check_hidden_states()
        return replace(self._head, scores=Scores(**self._columns))

    def _begin(self, reply: ScoreReply, blocks: dict[str, NDArray[Any]]) -> None:
        self._head = reply
        self._columns = {
            name: np.empty((self._num_rows, *block.shape[1:]), block.dtype) for name, block in blocks.items()
        }

    def _check_alike(self, reply: ScoreReply, blocks: dict[str, NDArray[Any]]) -> None:
        assert self._head is not None
        identity = (self._request.rollout_id, self._head.teacher_fingerprint, self._head.replica)
        if (reply.rollout_id, reply.teacher_fingerprint, reply.replica) != identity:
            raise self._misfit(f"rows of {reply.rollout_id} by {reply.teacher_fingerprint} are among them")
        if _widths(blocks) != _widths(self._columns):
            raise self._misfit(f"row {self._num_filled} has other fields or widths than the first")

    def _check_hidden_states(self) -> None:
        hidden_RH, scored_R = self._columns.get("hidden_states"), self._request.scored_rows
        if not self._request.wants_hidden_states:
            return
        if hidden_RH is None:
            raise self._misfit("hidden states were asked for and did not come")
        finite_R = np.isfinite(hidden_RH).all(axis=1)
        bad_R = ~finite_R if scored_R is None else ~finite_R & scored_R
        if bad_R.any():
            raise NonFiniteError(
                f"rollout {self._request.rollout_id}: the hidden states of {int(bad_R.sum())} rows are NaN or "
                f"infinite, first of row {int(np.argmax(bad_R))}; no score is exact there"
            )

    def _misfit(self, reason: str) -> InternalError:
        return InternalError(f"rollout {self._request.rollout_id}: a broken stream, {reason}")


def _columns(scores: Scores) -> dict[str, NDArray[Any]]:
    found = {name: getattr(scores, name) for name in _FIELDS}
    return {name: column for name, column in found.items() if column is not None}


def _widths(columns: dict[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    return {name: column.shape[1:] for name, column in columns.items()}
