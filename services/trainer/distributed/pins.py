"""One teacher for a step over all ranks: each asks by itself, and a teacher may be replaced between two of them."""

import time
from collections.abc import Mapping
from concurrent.futures import Future

from opd.errors import TeacherUnavailableError
from opd.types import Rollout, ScoreReply, Scores
from services.trainer.distributed.ranks import Ranks, together
from services.trainer.step_rollouts import Scorer, StepPrompt

_TRIES = 5
_PAUSE_S = 1.0


class SharedPins:
    """A `Scorer` whose `pin` gives what all ranks have agreed on with `agree`."""

    def __init__(self, teachers: Scorer, ranks: Ranks, *, pause_s: float = _PAUSE_S) -> None:
        """`pause_s`: between two tries [s]."""
        self._teachers = teachers
        self._ranks = ranks
        self._pause_s = pause_s
        self._agreed: dict[str, str] = {}

    def agree(self) -> None:
        """Pins on all ranks, again where they differ; collective, and signals must wait meanwhile.

        It holds for every step that is sampled until the next time: with a lag the first steps share one.

        `TeacherUnavailableError`, which may pass, where they never agree.
        """
        for number in range(_TRIES):
            if number:
                time.sleep(self._pause_s)
            pinned: dict[str, str] = {}
            with together(self._ranks):
                pinned = self._teachers.pin()
            found = self._ranks.gather(pinned)
            differing = _differing(found)
            if not differing:
                self._agreed = pinned
                return
        raise TeacherUnavailableError(
            f"ranks see different teachers after {_TRIES} tries ({'; '.join(differing)}); wait until all replicas of a "
            "pool serve one, and start again with --resume"
        )

    def pin(self) -> dict[str, str]:
        """What was agreed on before the step; asks nobody."""
        return dict(self._agreed)

    def send(self, rollout: Rollout, prompt: StepPrompt) -> Future[ScoreReply]:
        """See `Scorer.send`."""
        return self._teachers.send(rollout, prompt)

    def accept(self, rollout: Rollout, prompt: StepPrompt, reply: ScoreReply, pinned: Mapping[str, str]) -> Scores:
        """See `Scorer.accept`."""
        return self._teachers.accept(rollout, prompt, reply, pinned)


def _differing(found: list[dict[str, str]]) -> list[str]:
    """Teachers by name with the fingerprints that ranks have seen; empty where all have seen the same."""
    seen = {name: sorted({pinned[name] for pinned in found}) for name in found[0]}
    return [f"{name or 'teacher'}: {', '.join(ids)}" for name, ids in seen.items() if len(ids) > 1]
