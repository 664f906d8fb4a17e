"""The rollouts of one step on their way: sent as they end, judged when their group is whole, trained once scored.

A step may be sampled before the one it follows is trained, so what belongs to one step alone stands here: its prompts,
the teachers' fingerprints it was sent under, its replies, its rewards. Nothing is dropped silently: every rollout that
was sent is taken once, is counted as lost, or ends the step with an error.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from opd.errors import OpdError
from opd.types import Ids, Rollout, ScoreReply, Scores
from services.trainer.diagnostics.means import Mean
from services.trainer.distributed.share import Share
from services.trainer.objectives.outcome import group_advantages

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
        """The fingerprint by teacher that every score of a step has to come from."""
        ...

    def send(self, rollout: Rollout, prompt: StepPrompt) -> Future[ScoreReply]:
        """Returns at once."""
        ...

    def accept(self, rollout: Rollout, prompt: StepPrompt, reply: ScoreReply, pinned: Mapping[str, str]) -> Scores:
        """The scores of a reply that fits what was pinned; an `OpdError` for one that does not."""
        ...


Reward = Callable[[Rollout, StepPrompt], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Rollouts of a run or a step; sent = scored + lost once all are answered."""

    sent: int = 0
    scored: int = 0
    lost: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(sent=self.sent + other.sent, scored=self.scored + other.scored, lost=self.lost + other.lost)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """A rollout with its scores and, where answers are verified, its advantage in its group."""

    rollout: Rollout
    scores: Scores
    advantage: float | None


class StepRollouts:
    """One step's rollouts between the sampler and the gradient, in the thread of the loop.

    `send` takes each as it ends; `take` gives those that may train now, `wait` blocks until there is something new.
    """

    def __init__(
        self,
        prompts: Sequence[StepPrompt],
        teachers: Scorer,
        *,
        rollouts_per_prompt: int,
        share: Share | None = None,
        reward: Reward | None = None,
        drops_unscored: bool = False,
    ) -> None:
        """`share` is whose rollouts are sampled here; all where there are no other ranks."""
        self.prompts = prompts
        self.fingerprints = teachers.pin()
        self.counts = Counts()
        self._teachers = teachers
        self._per_prompt = rollouts_per_prompt
        self._num_rollouts = len((share or Share()).rollouts(len(prompts), rollouts_per_prompt))
        self._reward = reward
        self._drops_unscored = drops_unscored
        self._sent: dict[str, Rollout] = {}
        """What has not been taken yet."""
        self._replies: dict[str, Future[ScoreReply]] = {}
        self._news: SimpleQueue[str] = SimpleQueue()
        self._arrived: dict[str, None] = {}
        """Ids with a reply, in the order of arrival."""
        self._groups: dict[int, list[Rollout]] = {}
        """Rollouts by group until it is whole and judged."""
        self._advantages: dict[str, float] = {}
        self._rewards: list[float] = []
        self._num_groups = self._num_without_difference = 0

    def send(self, rollout: Rollout) -> None:
        """Has it scored while others still decode."""
        name = rollout.rollout_id
        self._sent[name] = rollout
        if self._reward is not None:
            self._groups.setdefault(rollout.group, []).append(rollout)
        reply = self._teachers.send(rollout, self.prompts[rollout.group])
        self._replies[name] = reply
        self.counts += Counts(sent=1)
        reply.add_done_callback(lambda _: self._news.put(name))

    @property
    def is_exhausted(self) -> bool:
        """Whether all of the step has been sampled and taken, or counted as lost."""
        return self.counts.sent == self._num_rollouts and not self._sent

    def judge(self) -> None:
        """Grades the groups that are whole: each advantage is by what all of its group have earned, scored or not."""
        if self._reward is None:
            return
        for group in [group for group, members in self._groups.items() if len(members) == self._per_prompt]:
            members = self._groups.pop(group)
            rewards = [self._reward(rollout, self.prompts[group]) for rollout in members]
            advantages = group_advantages(rewards, [group] * len(members))
            self._advantages |= {rollout.rollout_id: value for rollout, value in zip(members, advantages, strict=True)}
            self._rewards += rewards
            self._num_groups += 1
            self._num_without_difference += not any(advantages)

    def wait(self) -> None:
        """Blocks until another reply, or an error in place of one, has come."""
        self._arrived[self._news.get()] = None

    def take(self) -> list[Answered]:
        """What may train now. What could not be scored ends the step here, or is counted and left out."""
        self._receive()
        self.judge()
        answered = []
        for name in [name for name in self._arrived if self._reward is None or name in self._advantages]:
            del self._arrived[name]
            rollout = self._sent.pop(name)
            scores = self._scores(rollout)
            if scores is not None:
                self.counts += Counts(scored=1)
                answered.append(Answered(rollout=rollout, scores=scores, advantage=self._advantages.get(name)))
        return answered

    def outcomes(self) -> dict[str, Mean]:
        """The metrics of the rewards; empty where nothing is graded."""
        if self._reward is None:
            return {}
        return {
            "outcome/reward": Mean(total=sum(self._rewards), count=len(self._rewards)),
            "outcome/zero_variance_fraction": Mean(total=self._num_without_difference, count=self._num_groups),
        }

    def _receive(self) -> None:
        while True:
            try:
                self._arrived[self._news.get_nowait()] = None
            except Empty:
                break
        if not self._drops_unscored:
            for name in self._arrived:
                self._raise_error_of(name)

    def _scores(self, rollout: Rollout) -> Scores | None:
        """None for a rollout that is dropped."""
        try:
            reply = self._replies.pop(rollout.rollout_id).result()
            return self._teachers.accept(rollout, self.prompts[rollout.group], reply, self.fingerprints)
        except OpdError as error:
            # A retryable error is about the service, not about one rollout, and ends the run in any case.
            if error.retryable or not self._drops_unscored:
                raise _not_scored(rollout.rollout_id, error) from error
            _log.warning("rollout %s is dropped: %s", rollout.rollout_id, error.message)
            self.counts += Counts(lost=1)
            return None

    def _raise_error_of(self, name: str) -> None:
        """Ends the wait for the others as soon as one rollout cannot be scored."""
        error = self._replies[name].exception()
        if error is None:
            return
        for reply in self._replies.values():
            reply.cancel()
        if isinstance(error, OpdError):
            raise _not_scored(name, error) from error
        raise error


def _not_scored(name: str, error: OpdError) -> OpdError:
    return type(error)(f"rollout {name} was not scored: {error.message}")
