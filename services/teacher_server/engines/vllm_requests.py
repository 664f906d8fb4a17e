"""One sequence through vLLM: what is asked of it, and what comes back as arrays.

R response rows, K fixed ids, N ranked ids, P first row + 1. vLLM is told to sample one token, greedily, because it
cannot be told to sample none; the scores are those of the prompt's tokens. It answers a prompt position with the
prompt's own token first and then the N most likely ones, N + 1 entries whether or not the two overlap, and the first
position, which nothing predicts, with no entry.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from opd.errors import InternalError, InvalidRequestError, OpdError
from opd.types import Floats, Ids

FixedIds: TypeAlias = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmRun:
    """A sequence and what is wanted of the rows from `first_row` on (row t predicts token t + 1).

    Example: prompt [5, 9] and response [7, 1], the teacher's two best ids: rows 1 and 2 are wanted::

        VllmRun(token_ids=np.array([5, 9, 7, 1], np.int32), first_row=1, width=2)
    """

    token_ids: Ids
    first_row: int
    width: int | None
    """How many of the most likely ids; 0 is the sequence's own only, None is neither."""
    fixed_ids_RK: FixedIds | None = None
    """Ids whose log-probs are wanted, -1 for padding; V2 model runner only."""

    @property
    def num_rows(self) -> int:
        return int(self.token_ids.size) - 1 - self.first_row


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmRows:
    """What vLLM said of the wanted rows."""

    sampled_logprobs_R: Floats
    """[R] of the sequence's own tokens; empty where width was None."""
    ranked_ids_RN: Ids
    """[R, N] most likely first, ties in any order."""
    ranked_logprobs_RN: Floats
    fixed_logprobs_RK: Floats | None = None
    """[R, K]; minus infinity where the id was padding."""


def run_alone(engine: Any, run: VllmRun) -> VllmRows:
    """Computes one run with nothing beside it; raises its error."""
    ((_, found),) = run_together(engine, {0: run})
    if isinstance(found, OpdError):
        raise found
    return found


def run_together(engine: Any, runs: Mapping[int, VllmRun]) -> Iterator[tuple[int, VllmRows | OpdError]]:
    """Yields (key, outcome) of each run as the engine gets on; a run that vLLM refuses fails alone.

    An exception means that the engine failed. However this ends, nothing unfinished is left in the engine.
    """
    waiting: dict[str, int] = {}
    internal_ids: list[str] = []
    try:
        for key, run in runs.items():
            refusal = _add(engine, str(key), run, internal_ids)
            if refusal is None:
                waiting[str(key)] = key
            else:
                yield key, refusal
        while waiting:
            for output in engine.step():
                if output.finished and output.request_id in waiting:
                    key = waiting.pop(output.request_id)
                    yield key, read_output(output, runs[key])
    finally:
        if waiting:
            engine.abort_request(internal_ids, internal=True)


def _add(engine: Any, request_id: str, run: VllmRun, internal_ids: list[str]) -> OpdError | None:
    try:
        internal_ids.append(engine.add_request(request_id, {"prompt_token_ids": run.token_ids.tolist()}, _params(run)))
    except _refusals() as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:240]
        return InvalidRequestError(f"sequence of {run.token_ids.size} tokens: vLLM refuses it ({reason})")
    return None


def _refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises of a request that it does not take."""
    from vllm.exceptions import VLLMClientError

    return VLLMClientError, ValueError, TypeError


def _params(run: VllmRun) -> Any:
    from vllm import SamplingParams

    fixed: dict[str, Any] = {}
    if run.fixed_ids_RK is not None:
        fixed = {"prompt_logprob_token_ids": run.fixed_ids_RK, "prompt_logprob_start": run.first_row}
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=run.width,
        detokenize=False,
        # Flat lists instead of a dictionary per position: one object in place of thousands.
        flat_logprobs=True,
        **fixed,
    )


def read_output(output: Any, run: VllmRun) -> VllmRows | OpdError:
    """Arrays of the wanted rows; an InternalError when a row is missing."""
    num_columns = 0 if run.width is None else run.width + 1
    ids_RN = np.empty((run.num_rows, num_columns), np.int32)
    logprobs_RN = np.empty((run.num_rows, num_columns), np.float32)
    if run.width is not None:
        flat, num_wanted = output.prompt_logprobs, run.num_rows * num_columns
        # Every position but the first has an entry per column, so the wanted rows are the last ones.
        if flat is None or len(flat) != run.token_ids.size or len(flat.logprobs) < num_wanted:
            return _incomplete(run)
        ids_RN[:] = np.reshape(flat.token_ids[-num_wanted:], ids_RN.shape)
        logprobs_RN[:] = np.reshape(flat.logprobs[-num_wanted:], logprobs_RN.shape)
    fixed_RK = None
    if run.fixed_ids_RK is not None:
        fixed_RK = output.prompt_token_id_logprobs
        if fixed_RK is None or fixed_RK.shape != run.fixed_ids_RK.shape:
            return _incomplete(run)
    return VllmRows(
        sampled_logprobs_R=logprobs_RN[:, 0] if num_columns else np.empty(0, np.float32),
        ranked_ids_RN=ids_RN[:, 1:],
        ranked_logprobs_RN=logprobs_RN[:, 1:],
        fixed_logprobs_RK=fixed_RK,
    )


def _incomplete(run: VllmRun) -> OpdError:
    return InternalError(f"sequence of {run.token_ids.size} tokens: vLLM left out rows; the teacher's log may say more")
