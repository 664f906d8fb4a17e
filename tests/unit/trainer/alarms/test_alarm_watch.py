"""When an alarm begins and ends, what a resumed run knows of it, and who is told."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from opd.errors import ConfigError
from opd.settings import load_settings
from services.trainer.alarms.config import AlarmSettings
from services.trainer.alarms.contract import Alarm, AlarmName
from services.trainer.alarms.desk import AlarmDesk, StoppedByAlarm, require_horizon
from services.trainer.alarms.history import Record
from services.trainer.alarms.watch import AlarmWatch, Change
from services.trainer.horizon import LENGTH, Horizon
from services.trainer.http_api import RunStatus
from services.trainer.objectives.config import HorizonConfig
from services.trainer.run_log import EVENTS_FILE, RunLog
from tests.unit.trainer.test_horizon import agreeing

UNIFORM = "distill/uniform_teacher_fraction"


def record(step: int, fraction: float) -> dict[str, Any]:
    return {"step": step, UNIFORM: fraction}


def settings(*overrides: str) -> AlarmSettings:
    return load_settings(AlarmSettings, None, ["rearm_steps=3", *overrides])


def names(alarms: tuple[Alarm, ...]) -> list[str]:
    return [alarm.name for alarm in alarms]


def test_an_alarm_is_raised_once_and_is_over_after_enough_silence() -> None:
    watch = AlarmWatch(settings())
    told = []
    for step, fraction in enumerate([0.0, 0.5, 0.5, 0.0, 0.5, 0.0, 0.0, 0.0, 0.5], start=1):
        change = watch.observe(record(step, fraction))
        told.append((names(change.raised), names(change.cleared)))
    name = [AlarmName.UNIFORM_TEACHER]
    assert told == [([], []), (name, []), *[([], [])] * 5, ([], name), (name, [])]
    (alarm,) = watch.active
    assert alarm.step == 9 and alarm.numbers == {"uniform_teacher_fraction": 0.5}
    assert alarm.line.startswith("alarm uniform_teacher at step 9: at 50.0% of positions the teacher spreads evenly")


def test_a_resumed_run_stands_where_it_stood_and_raises_nothing_again() -> None:
    watch = AlarmWatch(settings(), [record(1, 0.0), record(2, 0.5)])
    assert [alarm.step for alarm in watch.active] == [2]
    assert watch.observe(record(3, 0.5)) == Change()


@pytest.mark.parametrize("override", ["enabled=false", 'off=["uniform_teacher"]'])
def test_what_is_off_is_not_watched(override: str) -> None:
    watch = AlarmWatch(settings(override))
    assert watch.observe(record(1, 0.5)) == Change() and watch.active == ()


def test_thresholds_are_settings() -> None:
    assert AlarmWatch(settings("uniform_teacher.max_fraction=0.6")).observe(record(1, 0.5)) == Change()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['stop=["gradient_spike"]', "enabled=false"], r"^alarms\.stop=gradient_spike: is not watched"),
        (['shorten=["overlap_collapse"]', 'off=["overlap_collapse"]'], r"^alarms\.shorten=overlap_collapse: is not"),
        (['off=["nothing"]'], r"^off\.0='nothing': input should be 'overlap_stagnating'"),
        (["gradient_spike.factor=1"], r"^gradient_spike\.factor=1: input should be greater than 1$"),
        (["gradient_spike.windows=30"], r"^gradient_spike\.windows: no such key; did you mean window_steps\?$"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(*overrides)


class Room:
    """A desk with a real log and a real status, and what was said in it."""

    def __init__(self, folder: Path, chosen: AlarmSettings, earlier: Iterable[Record] = (), **changes: Any) -> None:
        self.said: list[str] = []
        self.noted: list[tuple[int, str, str]] = []
        self.status, self.log = RunStatus(), RunLog(folder)
        self.log.create({})
        self.desk = AlarmDesk(
            chosen,
            AlarmWatch(chosen, earlier),
            log=self.log,
            say=self.said.append,
            note=lambda *line: self.noted.append(line),
            status=self.status,
            **changes,
        )

    def events(self) -> list[dict[str, Any]]:
        text = (self.log.run_dir / EVENTS_FILE).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


def test_everybody_is_told_with_numbers_and_remedy(tmp_path: Path) -> None:
    room = Room(tmp_path, settings())
    for step, fraction in ((1, 0.5), (2, 0.0), (3, 0.0)):
        room.desk.judge(record(step, fraction))
    (alarm,) = room.status.snapshot.alarms
    (event,) = room.events()
    assert {name: event[name] for name in alarm} == alarm
    assert (event["event"], event["step"], event["name"]) == ("alarm", 1, "uniform_teacher")
    assert event["numbers"] == {"uniform_teacher_fraction": 0.5}
    assert event["remedy"] == "the scores carry no signal: look at the teacher's weights, dtype and prompt"
    assert room.said == [room.noted[0][2]] and room.noted[0][:2] == (1, "alarm/uniform_teacher")
    room.desk.judge(record(4, 0.0))
    assert room.status.snapshot.alarms == ()
    assert room.events()[-1]["event"] == "alarm_over" and room.events()[-1]["step"] == 4
    assert room.said[-1] == "alarm uniform_teacher of step 1 is over"


def test_an_alarm_may_end_the_run_after_everybody_was_told(tmp_path: Path) -> None:
    room = Room(tmp_path, settings('stop=["uniform_teacher"]'))
    room.desk.judge(record(1, 0.0))
    with pytest.raises(StoppedByAlarm, match="alarm uniform_teacher at step 2") as stop:
        room.desk.judge(record(2, 0.5))
    assert stop.value.alarm.step == 2 and len(room.events()) == len(room.status.snapshot.alarms) == 1
    room.desk.judge(record(3, 0.5))


def test_only_chosen_alarms_shorten_the_horizon(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def shorten(alarmed: Sequence[Record]) -> None:
        asked.append([int(of["step"]) for of in alarmed])

    room = Room(tmp_path / "a", settings('shorten=["uniform_teacher"]'), shorten=shorten)
    for step, fraction in enumerate([0.0, 0.5, 0.0, 0.0, 0.0], start=1):
        room.desk.judge(record(step, fraction) | {"loss/small_support_fraction": 0.5})
    assert asked == [[], [], [2], [2], [2], []], "once before the first step, and after each; over at the last"
    asked.clear()
    Room(tmp_path / "b", settings(), shorten=shorten).desk.judge(record(1, 0.5))
    assert asked == [[], []]


def test_a_horizon_stays_short_until_the_alarm_is_over_also_in_a_resumed_run(tmp_path: Path) -> None:
    chosen = settings('shorten=["uniform_teacher", "small_supports"]')
    config = HorizonConfig(start=16, growth=2.0, min_positions=1)
    horizon = Horizon(config, longest=64)
    room = Room(tmp_path / "run", chosen, shorten=horizon.shorten)
    records: list[Record] = []
    for step in range(1, 10):
        metrics = {name: mean.value for name, mean in horizon.observe([agreeing("a", 64, [4] * 64)]).items()}
        # Two alarms in one step halve once; the second, a mean over three steps, is the later one to be over.
        fraction = float(step == 3)
        records.append(record(step, fraction) | metrics | {"loss/small_support_fraction": fraction})
        room.desk.judge(records[-1])
        resumed = Horizon(config, longest=64, records=records)
        Room(tmp_path / str(step), chosen, earlier=records, shorten=resumed.shorten)
        assert resumed.length == horizon.length
    assert [event["name"] for event in room.events() if event["step"] == 3] == ["small_supports", "uniform_teacher"]
    assert [of[LENGTH] for of in records] == [16, 32, 64, 32, 32, 32, 32, 32, 64]


def test_a_run_without_a_horizon_cannot_be_told_to_shorten_it() -> None:
    with pytest.raises(ConfigError, match=r"^alarms\.shorten=uniform_teacher: this run has no supervised horizon"):
        require_horizon(settings('shorten=["uniform_teacher"]'), None)
    require_horizon(settings(), None)
