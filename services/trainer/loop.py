"""On-policy distillation, one step after another: read this file first.

A step samples rollouts from the student as it is, has each scored by the teacher the moment it ends (and, where the
objective learns from outcomes, graded), and takes one optimizer step on the loss at the positions the student visited.
The loop knows protocols; `run.py` makes the parts.

Invariants: every rollout of a step was sampled by the weights the step changes (strictly on-policy); the loss is the
mean over all trained positions however they are split; the weights change once per step, after everything that could
refuse the step has been asked.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from opd.errors import ConfigError, InternalError, NonFiniteError, OpdError
from opd.types import Ids, Rollout, ScoreReply, Scores, rollout_id
from services.trainer.batch import ScoredRollout, build_batch, micro_batches
from services.trainer.diagnostics.means import Mean, joined
from services.trainer.horizon import Horizon
from services.trainer.loss import DistillLoss
from services.trainer.objectives.aggregation import denominator
from services.trainer.objectives.config import Aggregation
from services.trainer.objectives.outcome import group_advantages
from services.trainer.rollout.base import RolloutEngine, RolloutRequest, SamplingParams, derive_seed
from services.trainer.student import Student, StudentOptimizer
from services.trainer.weights import WeightPublisher

_log = logging.getLogger(__name__)


class StepPrompt(Protocol):
    """One prompt of a step, as each side is to see it."""

    @property
    def prompt_token_ids(self) -> Ids: ...
    @property
    def teacher_prompt_token_ids(self) -> Ids: ...
    @property
    def teacher(self) -> str:
        """Whose scores it trains on; empty where the run has a single teacher."""
        ...

    @property
    def template(self) -> str:
        """In whose form the answer is to be written; empty where that is not known."""
        ...

    @property
    def answer(self) -> str | None:
        """The known answer; None when there is none to grade against."""
        ...


class Scorer(Protocol):
    """Who scores rollouts: `TeacherRouter`, or `NoTeachers`."""

    def pin(self) -> dict[str, str]:
        """The fingerprint by teacher that every score of the step has to come from."""
        ...

    def send(self, rollout: Rollout, prompt: StepPrompt) -> Future[ScoreReply]:
        """Returns at once."""
        ...

    def accept(self, rollout: Rollout, prompt: StepPrompt, reply: ScoreReply) -> Scores:
        """The scores of a reply that fits; an `OpdError` for one that does not."""
        ...


class PromptSource(Protocol):
    """Which prompts a step trains on, by the step's number alone, so that a resumed run sees the same."""

    def step_prompts(self, step: int) -> Sequence[StepPrompt]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """What the loop itself decides by."""

    run: str
    """Unique per start of the process: part of every rollout's identity."""
    num_steps: int
    rollouts_per_prompt: int
    sampling: SamplingParams
    seed: int
    max_micro_batch_tokens: int
    aggregation: Aggregation = Aggregation.TOKEN_MEAN
    has_entropy_bonus: bool = False
    """Whether positions beyond the horizon train by it."""
    drops_unscored: bool = False
    """Whether a rollout that cannot be scored is left out instead of ending the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Rollouts of a run or a step; sent = scored + lost once all are answered."""

    sent: int = 0
    scored: int = 0
    lost: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(sent=self.sent + other.sent, scored=self.scored + other.scored, lost=self.lost + other.lost)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One completed step: what it trained on, what came of it, where the time went."""

    step: int
    """Completed steps, this one included."""
    prompts: Sequence[StepPrompt]
    scored: Sequence[ScoredRollout]
    fingerprints: dict[str, str]
    """The pinned fingerprint by teacher; every score of the step is of these."""
    counts: Counts
    losses: dict[str, Mean]
    grad_norm: float
    lr: float
    timings_s: dict[str, float]


class TrainingLoop:
    """The algorithm. `step` is the number of completed steps, and the policy version.

    Where an error left it `is_updating`, the weights are of no step.
    """

    def __init__(
        self,
        settings: LoopSettings,
        *,
        prompts: PromptSource,
        engine: RolloutEngine,
        teachers: Scorer,
        student: Student,
        loss: DistillLoss,
        optimizer: StudentOptimizer,
        weights: WeightPublisher,
        reward: Callable[[Rollout, StepPrompt], float] | None = None,
        horizon: Horizon | None = None,
        first_step: int = 0,
        interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`reward` grades rollouts where the objective learns from outcomes."""
        self.step = first_step
        self.is_updating = False
        self.counts = Counts()
        self._settings = settings
        self._prompts = prompts
        self._engine = engine
        self._teachers = teachers
        self._student = student
        self._loss = loss
        self._optimizer = optimizer
        self._weights = weights
        self._reward = reward
        self._horizon = horizon
        self._interruptible = interruptible

    def run(self, after_step: Callable[[StepRecord], None]) -> None:
        """Takes every step that is left; `after_step` logs, saves and evaluates."""
        self._weights.publish(self.step)
        while self.step < self._settings.num_steps:
            after_step(self.run_step())

    def run_step(self) -> StepRecord:
        """One step. An error says which it was; the weights are then those of the last one, unless it `is_updating`."""
        clock = StepClock()
        try:
            with self._interruptible():
                prompts = self._prompts.step_prompts(self.step)
                fingerprints = self._teachers.pin()
                rollouts, replies = self._sample(prompts)
                clock.lap("rollout")
                # Graded while the teacher is still scoring, by what all of a group have earned.
                advantages, outcomes = self._judge(prompts, rollouts)
                clock.lap("grade")
                scored = self._collect(prompts, rollouts, replies, advantages)
                clock.lap("score_wait")
            losses = self._accumulate_gradient(scored) | outcomes
            clock.lap("forward_backward")
            grad_norm = self._clip()
        except OpdError as error:
            raise _at_step(self.step + 1, error) from error
        except torch.OutOfMemoryError as error:
            raise _at_step(self.step + 1, _out_of_memory(error)) from error
        self.is_updating = True
        try:
            lr = self._optimizer.step(self.step)
        except torch.OutOfMemoryError as error:
            raise _at_step(self.step + 1, _out_of_memory(error)) from error
        self.step += 1
        self.is_updating = False
        if self._horizon is not None:
            losses |= self._horizon.observe(scored)
        clock.lap("optimizer")
        self._weights.publish(self.step)
        clock.lap("publish")
        return StepRecord(
            step=self.step,
            prompts=prompts,
            scored=scored,
            fingerprints=fingerprints,
            counts=Counts(sent=len(rollouts), scored=len(scored), lost=len(rollouts) - len(scored)),
            losses=losses,
            grad_norm=grad_norm,
            lr=lr,
            timings_s=clock.timings_s(),
        )

    def _sample(self, prompts: Sequence[StepPrompt]) -> tuple[list[Rollout], dict[str, Future[ScoreReply]]]:
        """Samples every rollout of the step and sends each for scoring while the others still decode."""
        replies: dict[str, Future[ScoreReply]] = {}

        def send(rollout: Rollout) -> None:
            replies[rollout.rollout_id] = self._teachers.send(rollout, prompts[rollout.group])
            self.counts += Counts(sent=1)

        rollouts = self._engine.sample(self._requests(prompts), self._settings.sampling, on_finish=send)
        stale = [rollout for rollout in rollouts if rollout.policy_version != self.step]
        if stale:
            raise InternalError(
                f"rollout {stale[0].rollout_id} is of policy version {stale[0].policy_version}, not {self.step}"
            )
        return rollouts, replies

    def _requests(self, prompts: Sequence[StepPrompt]) -> list[RolloutRequest]:
        """`rollouts_per_prompt` requests for each prompt, told apart by their seeds."""
        per_prompt = self._settings.rollouts_per_prompt
        return [
            RolloutRequest(
                rollout_id=rollout_id(self._settings.run, self.step, index),
                group=index // per_prompt,
                prompt_token_ids=prompts[index // per_prompt].prompt_token_ids,
                seed=derive_seed(self._settings.seed, self.step, index),
            )
            for index in range(len(prompts) * per_prompt)
        ]

    def _judge(
        self, prompts: Sequence[StepPrompt], rollouts: Sequence[Rollout]
    ) -> tuple[dict[str, float], dict[str, Mean]]:
        """Each rollout's advantage in its group, which is complete here: also what is not scored has its reward."""
        if self._reward is None:
            return {}, {}
        rewards = [self._reward(rollout, prompts[rollout.group]) for rollout in rollouts]
        advantages = group_advantages(rewards, [rollout.group for rollout in rollouts])
        by_id = {rollout.rollout_id: value for rollout, value in zip(rollouts, advantages, strict=True)}
        mixed = {rollout.group for rollout in rollouts if by_id[rollout.rollout_id]}
        num_groups = len({rollout.group for rollout in rollouts})
        return by_id, {
            "outcome/reward": Mean(total=sum(rewards), count=len(rewards)),
            "outcome/zero_variance_fraction": Mean(total=num_groups - len(mixed), count=num_groups),
        }

    def _collect(
        self,
        prompts: Sequence[StepPrompt],
        rollouts: Sequence[Rollout],
        replies: dict[str, Future[ScoreReply]],
        advantages: dict[str, float],
    ) -> list[ScoredRollout]:
        """Waits for every reply. What could not be scored ends the step, or is counted and left out."""
        if self._settings.drops_unscored:
            wait(replies.values())
        else:
            wait(replies.values(), return_when=FIRST_EXCEPTION)
            _raise_first_error(replies)
        scored: list[ScoredRollout] = []
        for rollout in rollouts:
            try:
                reply = replies[rollout.rollout_id].result()
                scores = self._teachers.accept(rollout, prompts[rollout.group], reply)
            except OpdError as error:
                self._drop(rollout, error)
            else:
                scored.append(
                    ScoredRollout(
                        rollout=rollout,
                        scores=scores,
                        supervised_tokens=self._horizon.length if self._horizon else None,
                        advantage=advantages.get(rollout.rollout_id),
                        has_entropy_bonus=self._settings.has_entropy_bonus,
                    )
                )
                self.counts += Counts(scored=1)
        if not scored:
            raise NonFiniteError("no rollout was scored, so there is nothing to train on; see the warnings above")
        return scored

    def _drop(self, rollout: Rollout, error: OpdError) -> None:
        """A retryable error is about the service, not about one rollout, and ends the run in any case."""
        if error.retryable or not self._settings.drops_unscored:
            raise type(error)(f"rollout {rollout.rollout_id} was not scored: {error.message}") from error
        _log.warning("rollout %s is dropped: %s", rollout.rollout_id, error.message)
        self.counts += Counts(lost=1)

    def _accumulate_gradient(self, scored: Sequence[ScoredRollout]) -> dict[str, Mean]:
        """Adds up the gradient of the mean over all positions of the step, one micro-batch at a time."""
        total = denominator(self._settings.aggregation, [item.num_trained_tokens for item in scored])
        self._optimizer.zero_grad()
        parts: list[dict[str, Mean]] = []
        for part in micro_batches(scored, self._settings.max_micro_batch_tokens):
            batch = build_batch(part, self._student.device)
            output = self._loss(batch)
            # The loss has been found finite by now, so a bad micro-batch never reaches the gradient.
            (output.loss_sum / total).backward()
            parts.append(output.metrics)
        return {name: joined(part[name] for part in parts) for name in parts[0]}

    def _clip(self) -> float:
        grad_norm = self._optimizer.clip()
        if not math.isfinite(grad_norm):
            self._optimizer.zero_grad()
            raise NonFiniteError(f"the gradient's norm is {grad_norm}; lower optim.lr or look at the last rollouts")
        return grad_norm


class StepClock:
    """Where the seconds of a step went."""

    def __init__(self) -> None:
        self._begun = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now

    def timings_s(self) -> dict[str, float]:
        return self._laps | {"step": self._last - self._begun}


def _raise_first_error(replies: dict[str, Future[ScoreReply]]) -> None:
    """Ends the wait for the others as soon as one rollout cannot be scored."""
    for name, future in replies.items():
        error = future.exception() if future.done() and not future.cancelled() else None
        if error is None:
            continue
        for other in replies.values():
            other.cancel()
        if isinstance(error, OpdError):
            raise type(error)(f"rollout {name} was not scored: {error.message}") from error
        raise error


def _out_of_memory(error: torch.OutOfMemoryError) -> ConfigError:
    reason = str(error).strip().splitlines()[0]
    return ConfigError(
        f"the device is out of memory ({reason}); lower student.max_micro_batch_tokens or student.row_chunk, or while "
        "sampling rollout.max_slots, and use --resume"
    )


def _at_step(step: int, error: OpdError) -> OpdError:
    return type(error)(f"step {step}: {error.message}", retry_after_s=error.retry_after_s)
