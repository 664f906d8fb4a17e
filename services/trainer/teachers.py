"""The teachers of a run by name: to the loop they are one, and each prompt is scored by the teacher it names.

A run with a single teacher has it under the empty name, which is what a prompt without a teacher of its own says. Every
teacher is pinned before a step, so that within a step each name stands for one fingerprint.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Protocol

from opd.errors import ConfigError
from opd.types import Ids, Rollout, ScoreReply, Scores, TeacherInfo
from services.trainer.teacher_client import TeacherClient

_log = logging.getLogger(__name__)


class TaughtPrompt(Protocol):
    """What of a prompt decides who scores its rollouts, and as what the teacher sees it."""

    @property
    def teacher(self) -> str: ...
    @property
    def teacher_prompt_token_ids(self) -> Ids: ...


class TeacherRouter:
    """Sends each rollout to its prompt's teacher and has that teacher's answer checked."""

    def __init__(self, clients: Mapping[str, TeacherClient]) -> None:
        self._clients = dict(clients)

    def shake_hands(self, *, wait_s: float, on_wait: Callable[[str], None] = _log.info) -> None:
        """Meets every teacher; one that cannot score this student ends the run before it starts."""
        for client in self._clients.values():
            info = client.shake_hands(wait_s=wait_s, on_wait=on_wait)
            _log.info("teacher %s: %s (%s, %s)", info.teacher, info.model, info.fingerprint, info.engine)

    def try_scoring(self, run: str) -> None:
        """As `TeacherClient.try_scoring`, of every teacher; ids begin with `run`, which nothing else may begin with."""
        for index, client in enumerate(self._clients.values()):
            client.try_scoring(f"{run}.{index}")

    def info(self, name: str) -> TeacherInfo:
        """The pinned handshake of one teacher."""
        return self._clients[name].info

    def pin(self) -> dict[str, str]:
        """Called once a step: the fingerprint by name that every score of the step has to come from."""
        return {name: client.pin() for name, client in self._clients.items()}

    def send(self, rollout: Rollout, prompt: TaughtPrompt) -> Future[ScoreReply]:
        """As `TeacherClient.send`, of the prompt's teacher."""
        return self._client(prompt).send(rollout, prompt.teacher_prompt_token_ids)

    def accept(
        self, rollout: Rollout, prompt: TaughtPrompt, reply: ScoreReply, pinned: Mapping[str, str] | None = None
    ) -> Scores:
        """As `TeacherClient.accept`; another teacher's reply has another fingerprint and is refused.

        `pinned` is what `pin` gave before the rollout was sent; None stands for what it gave last.
        """
        return self._client(prompt).accept(rollout, reply, None if pinned is None else pinned[prompt.teacher])

    def _client(self, prompt: TaughtPrompt) -> TeacherClient:
        try:
            return self._clients[prompt.teacher]
        except KeyError:
            known = ", ".join(sorted(self._clients))
            raise ConfigError(f"teacher {prompt.teacher!r} of a prompt: is none of {known}; name it there") from None


class NoTeachers:
    """For an objective that learns from outcomes alone: nobody is met, and nothing is said of a rollout."""

    def pin(self) -> dict[str, str]:
        return {}

    def send(self, rollout: Rollout, prompt: TaughtPrompt) -> Future[ScoreReply]:
        """Done at once, with no scores in it."""
        del prompt
        reply: Future[ScoreReply] = Future()
        reply.set_result(ScoreReply(rollout_id=rollout.rollout_id, teacher_fingerprint="", scores=Scores()))
        return reply

    def accept(
        self, rollout: Rollout, prompt: TaughtPrompt, reply: ScoreReply, pinned: Mapping[str, str] | None = None
    ) -> Scores:
        del rollout, prompt, pinned
        return reply.scores
