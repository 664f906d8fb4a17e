"""Tells an alarm to everybody who should know, and does what the settings say should be done about it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from opd.errors import ConfigError
from services.trainer.alarms.config import AlarmSettings
from services.trainer.alarms.contract import Alarm
from services.trainer.alarms.history import Record
from services.trainer.alarms.watch import AlarmWatch


class StoppedByAlarm(Exception):
    """Not an error of the run: it was asked to end here, and can be resumed."""

    def __init__(self, alarm: Alarm) -> None:
        super().__init__(alarm.line)
        self.alarm = alarm


def require_horizon(settings: AlarmSettings, horizon: object | None) -> None:
    """`ConfigError` where alarms are to shorten a horizon and the run has none."""
    if settings.shorten and horizon is None:
        raise ConfigError(
            f"alarms.shorten={', '.join(settings.shorten)}: this run has no supervised horizon to shorten; set "
            "objective.horizon.start, or leave it out"
        )


class EventLog(Protocol):
    def write_event(self, kind: str, **fields: Any) -> None: ...


class Status(Protocol):
    def show_alarms(self, alarms: tuple[Mapping[str, Any], ...]) -> None: ...


class AlarmDesk:
    """Raised alarms go to events.jsonl, the terminal, the status server and, through `note`, the other loggers.

    `shorten` keeps the supervised part of responses short from the next step on: after each step it is given the
    records of the steps at which those of `alarms.shorten` were raised that are not over. A resumed run has them too.
    """

    def __init__(
        self,
        settings: AlarmSettings,
        watch: AlarmWatch,
        *,
        log: EventLog,
        say: Callable[[str], None],
        note: Callable[[int, str, str], None],
        status: Status,
        shorten: Callable[[Sequence[Record]], None] | None = None,
    ) -> None:
        self._settings = settings
        self._watch = watch
        self._log = log
        self._say = say
        self._note = note
        self._status = status
        self._shorten = shorten
        self._keep_short()
        self._show()

    def judge(self, record: Record) -> None:
        """Judges the run after a step; raises `StoppedByAlarm` when the settings want the run to end."""
        change = self._watch.observe(record)
        for alarm in change.cleared:
            self._log.write_event("alarm_over", step=record["step"], name=str(alarm.name))
            self._say(f"alarm {alarm.name} of step {alarm.step} is over")
        for alarm in change.raised:
            self._log.write_event("alarm", **alarm.as_json())
            self._say(alarm.line)
            self._note(alarm.step, f"alarm/{alarm.name}", alarm.line)
        self._keep_short()
        if change.raised or change.cleared:
            self._show()
        for alarm in change.raised:
            if alarm.name in self._settings.stop:
                raise StoppedByAlarm(alarm)

    def _keep_short(self) -> None:
        if self._shorten is not None:
            self._shorten(self._watch.began(self._settings.shorten))

    def _show(self) -> None:
        self._status.show_alarms(tuple(alarm.as_json() for alarm in self._watch.active))
