"""A run from its first step to its end: what happens after each step, and what is left on disk however it ends.

Order after a step: metrics line, status, other loggers, alarms, checkpoint, evaluation. A run that is stopped, or fails
for whatever reason that has nothing to do with its weights, saves the last completed step first, so that `--resume`
loses nothing but the step under way: it begins with the evaluation of the step it goes on from, where that is due and
was never taken.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from opd.errors import CheckpointError, InternalError, NonFiniteError, OpdError, RankLostError
from services.trainer.alarms.desk import AlarmDesk, StoppedByAlarm
from services.trainer.config import TrainSettings
from services.trainer.console import RunConsole
from services.trainer.distributed.means import reduce_counts
from services.trainer.distributed.ranks import Ranks
from services.trainer.http_api import RunStatus
from services.trainer.loggers.contract import Loggers
from services.trainer.loop import StepRecord, TrainingLoop
from services.trainer.memory import FOR_EVALUATION, FOR_STEP, memory_errors
from services.trainer.run_log import RunLog, first_and_last
from services.trainer.step_metrics import StepMetrics
from services.trainer.stop import StopRequested
from services.trainer.teacher_client import fixed_part

_log = logging.getLogger(__name__)
_CLOSE_S = 10.0


class TrainingRun:
    """Drives the loop. Made by `assembly.assemble`, which hands over everything that has to be closed."""

    def __init__(
        self,
        settings: TrainSettings,
        *,
        num_steps: int,
        loop: TrainingLoop,
        metrics: StepMetrics,
        log: RunLog,
        save: Callable[[int], Path],
        evaluate: Callable[[int], dict[str, float]] | None,
        status: RunStatus,
        console: RunConsole,
        ranks: Ranks,
        alarms: AlarmDesk,
        loggers: Loggers,
    ) -> None:
        self._settings = settings
        self._num_steps = num_steps
        self._loop = loop
        self._metrics = metrics
        self._log = log
        self._save_step = save
        self._evaluate_step = evaluate
        self._status = status
        self._console = console
        self._ranks = ranks
        self._alarms = alarms
        self._loggers = loggers
        self._resources = ExitStack()
        self._first_step = loop.step
        self._saved_step = loop.step
        self._begun = time.monotonic()
        self._teachers: dict[str, str] = {}
        self._evaluations = log.evaluations() if self._first_step else {}

    def train(self) -> None:
        """Every step that is left, then the final checkpoint, evaluation and summary."""
        try:
            with self._console, memory_errors(FOR_STEP):
                self._train()
        except StopRequested as request:
            self._console.say(f"stopped by {request.signal_name} after step {self._loop.step}; go on with --resume")
            self._end("stopped")
            raise
        except StoppedByAlarm as request:
            self._console.say(f"stopped by alarm {request.alarm.name} after step {self._loop.step}; see alarms.stop")
            self._end("stopped")
            raise
        except Exception as error:
            self._fail(error)
            raise
        self._end("finished")

    def own(self, resources: ExitStack) -> None:
        """Hands over what `close` is to close."""
        self._resources.push(resources)

    def close(self) -> None:
        """Closes everything in the reverse order of its making."""
        self._resources.close()

    def _train(self) -> None:
        self._evaluate_where_due()
        self._note("start", step=self._first_step, num_steps=self._num_steps)
        self._status.begin(self._first_step, self._num_steps)
        self._console.begin(self._first_step, self._num_steps)
        self._loop.run(self._after_step)
        self._save()
        self._evaluate_where_due()

    def _after_step(self, record: StepRecord) -> None:
        teachers = {name: fixed_part(fingerprint) for name, fingerprint in record.fingerprints.items()}
        if teachers != self._teachers:
            self._teachers = teachers
            self._note("teachers", step=record.step, fingerprints=record.fingerprints)
        with self._ranks.in_step():
            summary = self._metrics.summarize(record)
            written = self._log.write_step(record.step, summary.values, summary.arrays)
            self._status.finish_step(record.step, summary.values)
            self._console.finish_step(record.step, self._num_steps, summary.values)
            self._loggers.log_step(record.step, summary)
            stopped = self._judge(written)
        if stopped is not None:
            raise stopped
        every = self._settings.checkpoint.every_steps
        if every and record.step % every == 0:
            self._save()
        # The last step is saved first.
        if record.step < self._num_steps:
            self._evaluate_where_due()

    def _judge(self, written: Mapping[str, Any]) -> StoppedByAlarm | None:
        try:
            self._alarms.judge(written)
        except StoppedByAlarm as request:
            # All ranks judge the same numbers, so this is no way of leaving the others.
            return request
        return None

    def _note(self, event: str, **values: Any) -> None:
        """Writes an event while the run goes on; a disk that refuses it ends all ranks."""
        with self._ranks.in_step():
            self._log.write_event(event, **values)

    def _save(self) -> None:
        """Writes the last completed step, once."""
        step = self._loop.step
        if step == self._saved_step:
            return
        folder = self._save_step(step)
        self._saved_step = step
        self._note("checkpoint", step=step, folder=folder.name)

    def _is_evaluation_due(self, step: int) -> bool:
        evaluation = self._settings.evaluation
        if step == 0:
            return evaluation.before
        if step >= self._num_steps:
            return evaluation.after
        return evaluation.every_steps > 0 and step % evaluation.every_steps == 0

    def _evaluate_where_due(self) -> None:
        """Evaluates the last completed step, once."""
        step = self._loop.step
        if self._evaluate_step is None or step in self._evaluations or not self._is_evaluation_due(step):
            return
        self._status.enter("evaluating")
        with memory_errors(FOR_EVALUATION):
            results = self._evaluate_step(step)
        self._note("evaluation", step=step, results=results)
        self._loggers.log_values(step, {f"evaluation/{name}": value for name, value in results.items()})
        self._evaluations[step] = results
        found = "  ".join(f"{name} {value:.4f}" for name, value in results.items())
        self._console.say(f"evaluation after step {step}: {found}")
        self._status.enter("training")

    def _end(self, state: str, *, saves: bool = True) -> None:
        if saves:
            self._save()
        self._status.enter(state)
        self._log.write_event("end", state=state, step=self._loop.step)
        self._log.write_summary(self.summary(state))

    def _fail(self, error: Exception) -> None:
        """Ends the run, saved where its weights are sound; what goes wrong here must not hide `error`."""
        known = error if isinstance(error, OpdError) else InternalError(f"{type(error).__name__}: {error}")
        is_sound = not self._loop.is_updating and not isinstance(
            error, NonFiniteError | CheckpointError | RankLostError
        )
        try:
            self._log.write_event("error", code=known.code, message=known.message)
            # Ranks save together, so one that fails by itself cannot.
            self._end("failed", saves=is_sound and self._is_together())
        except Exception as another:
            _log.error("the failed run could not be put in order: %s", another)

    def summary(self, state: str) -> dict[str, Any]:
        """The run in one object, with what was before a resume; seconds are of this process alone."""
        records = self._log.steps()
        summary: dict[str, Any] = {"state": state, "steps": self._loop.step, "seed": self._settings.seed}
        if self._settings.objective.uses_teacher:
            summary |= self._sent(records)
        for name, metric in (("reverse_kl", "loss/reverse_kl"), ("overlap", "distill/overlap_ratio")):
            summary[f"{name}_first"], summary[f"{name}_last"] = first_and_last(records, metric)
        summary["evaluations"] = [{"step": step} | self._evaluations[step] for step in sorted(self._evaluations)]
        summary["wall_seconds"] = time.monotonic() - self._begun
        return summary

    def _sent(self, records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        counts = self._loop.counts
        # Only a step that was not completed leaves rollouts that are neither scored nor lost.
        abandoned = {"abandoned": float(counts.sent - counts.scored - counts.lost)}
        if self._is_together():
            abandoned = reduce_counts(self._ranks, abandoned)
        sent = {
            f"rollouts_{name}": round(sum(record.get(f"queue/rollouts_{name}", 0) for record in records))
            for name in ("sent", "scored", "lost")
        }
        return sent | {"rollouts_abandoned": round(abandoned["abandoned"])}

    def _is_together(self) -> bool:
        """Whether the other ranks still do what this one does."""
        try:
            self._ranks.check()
        except RankLostError:
            return False
        return True


def close_within(close: Callable[[], None], name: str, *, limit_s: float = _CLOSE_S) -> None:
    """Closes what may hang when the other side is gone, without holding up the end of the process."""
    thread = threading.Thread(target=close, name=f"close-{name}", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        _log.warning("%s did not close within %.0f s and is left behind", name, limit_s)
