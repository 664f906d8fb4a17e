"""Which alarms begin and end at a step: raised once, an alarm stays until its rule has been silent for a while."""

from collections.abc import Container, Iterable
from dataclasses import dataclass

from services.trainer.alarms.config import AlarmSettings
from services.trainer.alarms.contract import Alarm, AlarmName
from services.trainer.alarms.history import History, Record
from services.trainer.alarms.rules import RULES, find


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What a step changed."""

    raised: tuple[Alarm, ...] = ()
    cleared: tuple[Alarm, ...] = ()


class AlarmWatch:
    """Takes one record per step. Earlier records of a resumed run are replayed, so that it stands where it stood."""

    def __init__(self, settings: AlarmSettings, earlier: Iterable[Record] = ()) -> None:
        self._settings = settings
        self._history = History()
        self._active: dict[AlarmName, Alarm] = {}
        self._seen: dict[AlarmName, int] = {}
        for record in earlier:
            self.observe(record)

    @property
    def active(self) -> tuple[Alarm, ...]:
        """Alarms that were raised and are not over, in the order they were raised."""
        return tuple(self._active.values())

    def began(self, names: Container[AlarmName]) -> list[Record]:
        """The records of the steps at which those of `names` were raised that are not over."""
        return self._history.at([alarm.step for alarm in self.active if alarm.name in names])

    def observe(self, record: Record) -> Change:
        """Adds a step and judges the run again."""
        self._history.add(record)
        step = int(record["step"])
        raised, cleared = [], []
        for name in self._settings.watched:
            finding = find(name, self._history, self._settings)
            if finding is not None:
                self._seen[name] = step
                if name not in self._active:
                    rule = RULES[name]
                    self._active[name] = Alarm(
                        name=name, step=step, evidence=finding.evidence, numbers=finding.numbers,
                        remedy=rule.remedy, section=rule.section,
                    )  # fmt: skip
                    raised.append(self._active[name])
            elif name in self._active and step - self._seen[name] >= self._settings.rearm_steps:
                cleared.append(self._active.pop(name))
        return Change(raised=tuple(raised), cleared=tuple(cleared))
