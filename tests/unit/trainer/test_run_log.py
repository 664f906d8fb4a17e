"""The files of a run folder."""

import json
import math
from pathlib import Path

import pytest

from opd.errors import CheckpointError
from services.trainer.run_log import RunLog, first_and_last, read_steps


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    log = RunLog(tmp_path / "run")
    log.create({"seed": 3})
    return log


def test_steps_are_lines_of_json_with_area_and_name(log: RunLog) -> None:
    log.write_step(1, {"loss/reverse_kl": 0.5}, {"distill/overlap_ratio/by_position": [0.25, math.nan]})
    log.write_step(2, {"loss/reverse_kl": 0.25}, {})
    records = [json.loads(line) for line in (log.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss/reverse_kl"]) for record in records] == [(1, 0.5), (2, 0.25)]
    assert records[0]["distill/overlap_ratio/by_position"] == [0.25, None]
    assert json.loads((log.run_dir / "config.json").read_text()) == {"seed": 3}


def test_what_is_no_number_is_an_absent_key(log: RunLog) -> None:
    log.write_step(1, {"a/b": math.nan, "a/c": math.inf, "a/d": 1.0}, {})
    (record,) = log.steps()
    assert "a/b" not in record and "a/c" not in record and record["a/d"] == 1.0


def test_a_line_cut_off_by_a_crash_is_no_record(log: RunLog) -> None:
    log.write_step(1, {"a/b": 1.0}, {})
    with (log.run_dir / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "a/')
    assert [record["step"] for record in log.steps()] == [1]


def test_a_resume_forgets_steps_it_takes_again(log: RunLog) -> None:
    for step in (1, 2, 3):
        log.write_step(step, {"a/b": float(step)}, {})
    assert log.has_run()
    log.drop_after(2)
    assert [record["a/b"] for record in log.steps()] == [1.0, 2.0]
    log.write_step(3, {"a/b": 9.0}, {})
    assert [record["a/b"] for record in log.steps()] == [1.0, 2.0, 9.0]


def test_events_and_summary(log: RunLog) -> None:
    log.write_event("checkpoint", folder="x", step=3)
    (event,) = [json.loads(line) for line in (log.run_dir / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["folder"], event["step"]) == ("checkpoint", "x", 3)
    log.write_summary({"steps": 3})
    log.write_summary({"steps": 4})
    assert json.loads((log.run_dir / "train_summary.json").read_text()) == {"steps": 4}


def test_an_evaluation_counts_once_and_not_beyond_what_a_resume_went_back_to(log: RunLog) -> None:
    assert log.evaluations() == {}
    for step in (0, 2, 4, 6):
        log.write_event("evaluation", step=step, results={"accuracy/sums": step / 10})
    log.write_event("resume", step=4, changed=[])
    log.write_event("evaluation", step=4, results={"accuracy/sums": 0.5})
    log.write_event("end", state="stopped", step=5)
    assert log.evaluations() == {0: {"accuracy/sums": 0}, 2: {"accuracy/sums": 0.2}, 4: {"accuracy/sums": 0.5}}


def test_an_event_cut_off_by_a_crash_does_not_spoil_the_next(log: RunLog) -> None:
    for torn in ('{"time": 1, "event": "eval', '{"time": 1, "event": "checkpoint", "step": 2}'):
        log.write_event("evaluation", step=2, results={"accuracy/sums": 0.5})
        with (log.run_dir / "events.jsonl").open("a") as stream:
            stream.write(torn)
        again = RunLog(log.run_dir)
        again.create({})
        again.write_event("resume", step=2, changed=[])
        lines = (log.run_dir / "events.jsonl").read_text().splitlines()
        assert [json.loads(line)["event"] for line in lines][-2:] == ["evaluation", "resume"]
    assert again.evaluations() == {2: {"accuracy/sums": 0.5}}


def test_first_and_last_are_means_of_three() -> None:
    records = [{"x": float(value)} for value in (9, 6, 3, 100, 1, 2, 3)] + [{}]
    assert first_and_last(records, "x") == (6.0, 2.0)
    assert first_and_last(records, "y") == (None, None)
    assert first_and_last([{"x": 5.0}], "x") == (5.0, 5.0)


def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/run: cannot be written \(Not a directory\); free space there or"):
        RunLog(tmp_path / "file" / "run").create({})


def test_an_empty_folder_has_no_steps(tmp_path: Path) -> None:
    assert read_steps(tmp_path) == []
