"""On-policy distillation, one step after another: read this file first.

A step samples rollouts from the student as it is, has each scored by the teacher the moment it ends (and, where the
objective learns from outcomes, graded with its group), trains each as its scores return, and takes one optimizer step
on the mean of the loss over the positions the student visited. The loop knows protocols; `run.py` makes the parts.

Invariants: every rollout of a step was sampled by the weights the step changes (strictly on-policy), or by weights at
most `max_policy_lag` steps older; the gradient is that of the mean over all trained positions, whatever order they came
in; the weights change once per step, after everything that could refuse the step has been asked.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from opd.errors import InternalError, NonFiniteError, OpdError
from opd.types import Rollout, rollout_id
from services.trainer.batch import ScoredRollout
from services.trainer.diagnostics.means import Mean
from services.trainer.distributed.step_scope import LocalStep, StepScope
from services.trainer.horizon import Horizon
from services.trainer.loss import DistillLoss
from services.trainer.memory import FOR_STEP, memory_errors
from services.trainer.objectives.config import Aggregation
from services.trainer.pipeline import PipelineMode
from services.trainer.rollout.base import RolloutEngine, RolloutRequest, SamplingParams, derive_seed
from services.trainer.step_clock import StepClock
from services.trainer.step_gradient import StepGradient
from services.trainer.step_rollouts import Answered, Counts, Reward, Scorer, StepPrompt, StepRollouts
from services.trainer.student import Student, StudentOptimizer
from services.trainer.weights import WeightPublisher


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
    mode: PipelineMode = PipelineMode.STREAMING
    max_policy_lag: int = 0
    """Steps by which sampling may run ahead of training."""


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
    unpublished: OpdError | None = None
    """Why the sampler does not have the new weights; the run ends with it once the step is on record."""


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
        reward: Reward | None = None,
        horizon: Horizon | None = None,
        first_step: int = 0,
        interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
        scope: StepScope | None = None,
    ) -> None:
        """`reward` grades rollouts where the objective learns from outcomes; `scope` tells of other ranks."""
        self.step = first_step
        self.is_updating = False
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
        self._scope = scope or LocalStep()
        self._completed = Counts()
        self._ahead: deque[StepRollouts] = deque()
        """Steps that are sampled and not trained, the one to be trained next first."""

    @property
    def counts(self) -> Counts:
        """Of everything sent so far, what a step that was not completed has sent included."""
        return sum((ahead.counts for ahead in self._ahead), self._completed)

    def run(self, after_step: Callable[[StepRecord], None]) -> None:
        """Takes every step that is left; `after_step` logs, saves and evaluates."""
        self._weights.publish(self.step)
        while self.step < self._settings.num_steps:
            record = self.run_step()
            after_step(record)
            if record.unpublished is not None:
                raise record.unpublished

    def run_step(self) -> StepRecord:
        """One step. An error says which it was; the weights are then those of the last one, unless it `is_updating`."""
        clock = StepClock()
        with self._of_step():
            with self._scope.sampling(self._interruptible):
                gradient = self._new_gradient()
                self._sample_ahead(gradient, clock)
                current = self._ahead[0]
                self._train(current, gradient, clock)
            with self._scope.finishing(self._interruptible), clock.part("forward_backward"):
                losses = gradient.finish() | self._scope.means(current.outcomes())
            with clock.part("optimizer"):
                grad_norm = self._clip()
        with clock.part("optimizer"):
            lr = self._update()
        self._completed += self._ahead.popleft().counts
        scored = sorted(gradient.trained, key=lambda item: _index(item.rollout))
        if self._horizon is not None:
            losses |= self._horizon.observe(scored, self._scope.gather)
        with clock.part("publish"):
            unpublished = self._publish()
        return StepRecord(
            step=self.step,
            prompts=current.prompts,
            scored=scored,
            fingerprints=current.fingerprints,
            counts=current.counts,
            losses=losses,
            grad_norm=grad_norm,
            lr=lr,
            timings_s=clock.timings_s(),
            unpublished=unpublished,
        )

    @contextmanager
    def _of_step(self) -> Iterator[None]:
        """Errors say which step it was."""
        try:
            with memory_errors(FOR_STEP):
                yield
        except OpdError as error:
            raise _at_step(self.step + 1, error) from error

    def _sample_ahead(self, gradient: StepGradient, clock: StepClock) -> None:
        """Samples this step and, with a lag, those after it that may still come from the weights as they are."""
        last = min(self.step + self._settings.max_policy_lag, self._settings.num_steps - 1)
        while self.step + len(self._ahead) <= last:
            self._sample(self.step + len(self._ahead), gradient, clock)

    def _sample(self, step: int, gradient: StepGradient, clock: StepClock) -> None:
        """Samples every rollout of `step` and sends each for scoring while the others still decode."""
        settings = self._settings
        sampled = StepRollouts(
            self._prompts.step_prompts(step),
            self._teachers,
            rollouts_per_prompt=settings.rollouts_per_prompt,
            share=self._scope.share,
            reward=self._reward,
            drops_unscored=settings.drops_unscored,
        )
        self._ahead.append(sampled)

        def send(rollout: Rollout) -> None:
            if rollout.policy_version != self.step:
                raise InternalError(
                    f"rollout {rollout.rollout_id} is of policy version {rollout.policy_version}, not {self.step}"
                )
            sampled.send(rollout)
            # An engine that shares the student's weights and thread would only be held up.
            if self._streams and self._engine.samples_elsewhere:
                self._take(self._ahead[0], gradient, clock)

        with clock.part("rollout"):
            self._engine.sample(self._requests(step, sampled.prompts), settings.sampling, on_finish=send)
        with clock.part("grade"):
            # While the teacher is still scoring.
            sampled.judge()

    @property
    def _streams(self) -> bool:
        return self._settings.mode is PipelineMode.STREAMING

    def _train(self, current: StepRollouts, gradient: StepGradient, clock: StepClock) -> None:
        """Trains what has been scored, a part at a time, until nothing is left to wait for."""
        while not current.is_exhausted:
            if self._take(current, gradient, clock) or current.is_exhausted:
                continue
            if self._streams and gradient.has_rest:
                # A part that is not full costs more for each of its tokens, but waiting costs all of it.
                with clock.part("forward_backward"):
                    gradient.train_rest()
            else:
                with clock.part("score_wait"):
                    current.wait()

    def _take(self, current: StepRollouts, gradient: StepGradient, clock: StepClock) -> bool:
        """Adds what has been scored to the gradient, where it streams at once; whether there was anything."""
        scored = self._trainable(current.take())
        if scored and self._streams:
            with clock.part("forward_backward"):
                gradient.train_full(scored)
        else:
            gradient.hold(scored)
        return bool(scored)

    def _trainable(self, answered: Sequence[Answered]) -> list[ScoredRollout]:
        return [
            ScoredRollout(
                rollout=item.rollout,
                scores=item.scores,
                supervised_tokens=self._horizon.length if self._horizon else None,
                advantage=item.advantage,
                has_entropy_bonus=self._settings.has_entropy_bonus,
            )
            for item in answered
        ]

    def _new_gradient(self) -> StepGradient:
        return StepGradient(
            self._student,
            self._loss,
            self._optimizer,
            max_tokens=self._settings.max_micro_batch_tokens,
            aggregation=self._settings.aggregation,
            scope=self._scope,
        )

    def _requests(self, step: int, prompts: Sequence[StepPrompt]) -> list[RolloutRequest]:
        """`rollouts_per_prompt` requests for each prompt, told apart by their seeds.

        Their ids name the weights that sample them, and go on counting over the steps that come from the same.
        """
        per_prompt = self._settings.rollouts_per_prompt
        offset = (step - self.step) * len(prompts) * per_prompt
        return [
            RolloutRequest(
                rollout_id=rollout_id(self._settings.run, self.step, offset + index),
                group=index // per_prompt,
                prompt_token_ids=prompts[index // per_prompt].prompt_token_ids,
                seed=derive_seed(self._settings.seed, step, index),
            )
            for index in self._scope.share.rollouts(len(prompts), per_prompt)
        ]

    def _clip(self) -> float:
        grad_norm = self._optimizer.clip()
        if not math.isfinite(grad_norm):
            self._optimizer.zero_grad()
            raise NonFiniteError(f"the gradient's norm is {grad_norm}; lower optim.lr or look at the last rollouts")
        return grad_norm

    def _publish(self) -> OpdError | None:
        """What kept the weights from the sampler, if anything: the step is taken all the same."""
        try:
            self._weights.publish(self.step)
        except OpdError as error:
            return _at_step(self.step, error)
        return None

    def _update(self) -> float:
        """Changes the weights, which are of no step until it is done; returns the learning rate."""
        self.is_updating = True
        with self._of_step():
            lr = self._optimizer.step(self.step)
        self.step += 1
        self.is_updating = False
        return lr


def _index(rollout: Rollout) -> int:
    """Its place among the rollouts of its step."""
    return int(rollout.rollout_id.rpartition(".")[2])


def _at_step(step: int, error: OpdError) -> OpdError:
    return type(error)(f"step {step}: {error.message}", retry_after_s=error.retry_after_s)
