"""A tiny experiment through the real service: killed, resumed, and never trained twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("tiny_experiment.py")
PATIENCE_S = 240.0
NUM_STEPS = 12

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def start(folder: Path, results: str = "results") -> "subprocess.Popen[bytes]":
    environment = {name: value for name, value in os.environ.items() if name != "OPD_REDIS_URL"}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder / "work"), str(folder / results), str(NUM_STEPS)],
            cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log,
        )  # fmt: skip


def said(folder: Path) -> str:
    return (folder / "log.txt").read_text(encoding="utf-8")


def workers(folder: Path) -> list[int]:
    """Processes other than the launcher that name the working folder, or live in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"{folder / 'work'}/" in command:
            found.append(int(process.name))
    return found


def the_run(folder: Path) -> Path:
    (run,) = (folder / "work" / "runs").iterdir()
    return run


def test_a_killed_run_goes_on_and_a_finished_one_is_not_repeated(tmp_path: Path) -> None:
    killed = start(tmp_path)
    deadline = time.monotonic() + PATIENCE_S
    while not any(found.stat().st_size for found in (tmp_path / "work" / "runs").glob("*/metrics.jsonl")):
        assert killed.poll() is None and time.monotonic() < deadline, said(tmp_path)
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)

    # At once: the trainer of the killed launcher may still be saving its last step, and is waited for.
    assert start(tmp_path).wait(PATIENCE_S) == 0, said(tmp_path)
    run = the_run(tmp_path)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds.count("start") == 2 and "resume" in kinds, kinds
    resumed = next(event for event in events if event["event"] == "resume")
    assert 0 < resumed["step"] < NUM_STEPS
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, NUM_STEPS + 1))

    result = json.loads((tmp_path / "results" / "tiny.json").read_text(encoding="utf-8"))
    assert [claim["verdict"] for claim in result["claims"]] == ["held"]
    (found,) = result["arms"]["tiny"]["runs"]
    assert found["key"] == run.name
    assert len(found["series"]["distill/overlap_ratio"]) == NUM_STEPS
    assert len(found["accuracy_by_problem"]) == 3
    assert (tmp_path / "figures" / "tiny.png").stat().st_size > 5000

    before = (run / "events.jsonl").read_bytes()
    assert start(tmp_path, "again/results").wait(PATIENCE_S) == 0, said(tmp_path)
    assert (run / "events.jsonl").read_bytes() == before
    assert not list((tmp_path / "work" / "session" / "logs").glob("*"))
    again = json.loads((tmp_path / "again" / "results" / "tiny.json").read_text(encoding="utf-8"))
    assert again == result
    assert workers(tmp_path) == []


def test_a_budget_of_nothing_starts_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from experiments.running import run_experiments\n"
        "from tests.integration.experiments.tiny_experiment import tiny_experiment\n"
        "work = Path(sys.argv[1])\n"
        "sys.exit(run_experiments([tiny_experiment(2)], work_dir=work, minutes=0, console=Console(),"
        " results=work / 'results'))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "about 3 are left" in found.stdout
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "results").exists()
