"""What a rollout engine takes and gives: the seam between the trainer and whatever samples from the student.

An engine samples every request it is given, hands each rollout over the moment it ends (`on_finish`, in the thread that
called `sample`, while the other rows still decode), and returns all of them in the order of the requests. A rollout is
determined by the weights, its prompt, the sampling parameters and its seeds, never by its neighbours in the batch (up
to the rounding of logits, which some devices let depend on the batch's shape).
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from opd.errors import ConfigError, InvalidRequestError
from opd.types import Ids, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Example: the paper's evaluation is ``SamplingParams(temperature=0.7, top_p=0.95)``."""

    temperature: float = 1.0
    """Divides the logits; 0 means greedy. What is recorded while sampling greedily is at temperature 1."""
    top_p: float = 1.0
    """The smallest set of most likely tokens holding this much of the mass (of what `top_k` leaves) is kept."""
    top_k: int = -1
    """Only this many most likely tokens are kept; -1 means all."""
    max_response_tokens: int = 7168
    """A response that has not ended by then is cut off: `FinishReason.LENGTH`."""
    seed: int = 0
    """Of the run; combined with each request's own."""

    def check(self) -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"sampling.temperature: {self.temperature} is not usable; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p: {self.top_p} is not in (0, 1]; 1 keeps every token")
        if self.top_k < 1 and self.top_k != -1:
            raise ConfigError(f"sampling.top_k: {self.top_k} is not usable; give 1 or more, or -1 to keep every token")
        if self.max_response_tokens < 1:
            raise ConfigError(f"sampling.max_response_tokens: {self.max_response_tokens} is too small; give 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRequest:
    """One response wanted. Several requests with the same prompt and group differ by their seed."""

    rollout_id: str
    group: int
    prompt_token_ids: Ids
    """[P] as the student is to see them; P >= 1."""
    seed: int
    """Of this response; see `derive_seed`."""


class RolloutEngine(Protocol):
    """Samples responses from the student."""

    policy_version: int
    """The weight version stamped on every rollout; set by whoever changes the weights."""

    @property
    def samples_elsewhere(self) -> bool:
        """Whether it decodes in a process of its own, which training in `on_finish` does not hold up."""
        ...

    @property
    def max_context(self) -> int:
        """Prompt plus response tokens that fit; a request that could go over is refused."""
        ...

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        *,
        on_finish: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """One rollout per request, in the order of the requests; `on_finish` gets each as soon as it ends.

        Raises `ConfigError` for unusable sampling parameters, `InvalidRequestError` for an unusable prompt and
        `NonFiniteError` for NaN or infinite logits, each naming the rollout. An error raised by `on_finish` ends
        the call and passes through.
        """
        ...


def check_score_top_k(score_top_k: int | None, num_defined_ids: int) -> None:
    """Raises `ConfigError` for more ids a position than the student has; None records none."""
    if score_top_k is not None and not 0 <= score_top_k <= num_defined_ids:
        raise ConfigError(f"score_top_k: {score_top_k} is outside 0..{num_defined_ids}, the student's token ids")


def check_request(request: RolloutRequest, sampling: SamplingParams, *, num_defined_ids: int, max_context: int) -> None:
    """Raises `InvalidRequestError` for a prompt without tokens, with unknown ones, or with no room for its response."""
    prompt = np.asarray(request.prompt_token_ids)
    name = f"rollout {request.rollout_id}: prompt_token_ids"
    if prompt.ndim != 1 or prompt.size == 0:
        raise InvalidRequestError(f"{name} has shape {prompt.shape}; give at least one token id")
    if prompt.min() < 0 or prompt.max() >= num_defined_ids:
        bad = int(prompt[(prompt < 0) | (prompt >= num_defined_ids)][0])
        raise InvalidRequestError(f"{name} has id {bad}, outside 0..{num_defined_ids - 1}; use the student's tokenizer")
    num_tokens = prompt.size + sampling.max_response_tokens
    if num_tokens > max_context:
        raise InvalidRequestError(
            f"{name} of {prompt.size} tokens and max_response_tokens={sampling.max_response_tokens} need "
            f"{num_tokens} of the student's {max_context} context tokens; lower max_response_tokens or filter "
            "long prompts"
        )


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that differs for every different tuple of parts, such as (run seed, step, index)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
