"""Loggers beside the run folder's own files: what they write is read back by other means than their own."""

import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opd.errors import ConfigError
from opd.settings import load_settings
from services.trainer.config import TrainSettings
from services.trainer.diagnostics import BucketMeans, Mean, StepSummary
from services.trainer.loggers.build import open_loggers
from services.trainer.loggers.config import LoggerSettings, require_packages
from services.trainer.loggers.contract import Loggers, flat
from services.trainer.run import REFUSED, run_training

ROOT = Path(__file__).parents[4]
EMPTY = Mean(total=0.0, count=0.0)
SUMMARY = StepSummary(
    values={"loss/objective": 0.5},
    by_position={
        "distill/entropy_gap": BucketMeans(edges=(0, 16, 32), means=(Mean(total=3.0, count=4.0), EMPTY, EMPTY))
    },
)


def installed(package: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def chosen(*overrides: str) -> LoggerSettings:
    return load_settings(LoggerSettings, None, overrides)


def test_a_step_is_flat_numbers_without_empty_buckets() -> None:
    assert flat(SUMMARY) == {"loss/objective": 0.5, "distill/entropy_gap/by_position/00000": 0.75}


class Recorder:
    """A logger that fails from a step on."""

    def __init__(self, fails_at: int = 99) -> None:
        self.name, self.calls, self._fails_at = f"fails at {fails_at}", [], fails_at

    def log_step(self, step: int, summary: StepSummary) -> None:
        if step >= self._fails_at:
            raise OSError("disk full")
        self.calls.append(step)

    def close(self) -> None:
        self.calls.append("closed")


def test_one_logger_that_fails_is_left_out_and_told_about_once(caplog: pytest.LogCaptureFixture) -> None:
    sound, broken = Recorder(), Recorder(fails_at=2)
    loggers = Loggers([broken, sound])
    for step in (1, 2, 3):
        loggers.log_step(step, SUMMARY)
    loggers.close()
    assert (sound.calls, broken.calls) == ([1, 2, 3, "closed"], [1])
    assert [record.message for record in caplog.records] == ["logger fails at 2 is left out from here on: disk full"]


@pytest.mark.parametrize(
    ("overrides", "package"), [(["tensorboard=true"], "tensorboardX"), (["wandb.mode=offline"], "wandb")]
)
def test_a_missing_package_is_refused_with_the_way_to_get_it(
    overrides: list[str], package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    field = overrides[0].replace("tensorboard", "loggers.tensorboard").replace("wandb.", "loggers.wandb.")
    with pytest.raises(ConfigError, match=rf"^{field}: {package} is not installed; run `pip install {package}`"):
        require_packages(chosen(*overrides))
    # As a run: refused although neither student nor prompts are there.
    given = ["student.model=/nowhere", 'data.files=["/nowhere"]', f"loggers.{overrides[0]}"]
    assert run_training(None, given, resume=False) == REFUSED
    assert capsys.readouterr().err.startswith(f"opd train: {field}: {package} is not installed")


def test_no_logger_is_on_unless_asked_for_and_the_settings_load_neither_package() -> None:
    settings = load_settings(TrainSettings, None, ["student.model=x", 'data.files=["x"]'])
    loggers = open_loggers(settings.loggers, Path("nowhere"), config={}, first_step=0)
    loggers.log_step(1, SUMMARY)
    loggers.close()
    code = (
        "import sys, services.trainer.config, services.trainer.loggers.build\n"
        "assert not {'wandb', 'tensorboardX', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=60)


def write_two_steps(settings: LoggerSettings, run_dir: Path, first_step: int = 0) -> None:
    loggers = open_loggers(settings, run_dir, config={"seed": 7}, first_step=first_step)
    loggers.log_step(first_step + 1, SUMMARY)
    loggers.log_step(first_step + 2, SUMMARY)
    loggers.log_values(first_step + 2, {"evaluation/accuracy/heldout": 0.25})
    loggers.log_text(first_step + 2, "alarm/gradient_spike", "gradient norm 3 at step 2")
    loggers.close()


def events(folder: Path) -> list[bytes]:
    """The records of an event file: length, its checksum, the record, its checksum."""
    (path,) = folder.glob("events.out.tfevents.*")
    content, records = path.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        records.append(content[12 : 12 + size])
        content = content[16 + size :]
    return records


@installed("tensorboardX")
def test_tensorboard_files_hold_every_number_at_its_step(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    write_two_steps(chosen("tensorboard=true"), tmp_path)
    found = [Event.FromString(record) for record in events(tmp_path / "tensorboard")]
    scalars = {(e.step, v.tag): v.simple_value for e in found for v in e.summary.value if not v.HasField("tensor")}
    assert scalars == {
        **{(step, "loss/objective"): 0.5 for step in (1, 2)},
        **{(step, "distill/entropy_gap/by_position/00000"): 0.75 for step in (1, 2)},
        (2, "evaluation/accuracy/heldout"): 0.25,
    }
    texts = [v.tensor.string_val[0] for e in found for v in e.summary.value if v.HasField("tensor")]
    assert texts == [b"gradient norm 3 at step 2"]


@installed("tensorboardX")
@pytest.mark.parametrize("first_step", [0, 4])
def test_a_resumed_run_replaces_the_steps_it_takes_again(tmp_path: Path, first_step: int) -> None:
    """A run that was stopped before its first checkpoint begins again at 0, with events of its first steps written."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    write_two_steps(chosen("tensorboard=true"), tmp_path, first_step=first_step)
    found = [Event.FromString(record) for record in events(tmp_path / "tensorboard")]
    assert [e.step for e in found if e.session_log.status == SessionLog.START] == [first_step + 1]


@installed("wandb")
def test_weights_and_biases_offline_keeps_a_run_that_can_be_sent_later(tmp_path: Path) -> None:
    """In a process of its own, since the library starts a service and leaves it to the end of the process."""
    code = (
        "import json, sys\nfrom pathlib import Path\n"
        "from tests.unit.trainer.loggers.test_loggers import chosen, write_two_steps\n"
        "write_two_steps(chosen('wandb.mode=offline', 'wandb.project=tests'), Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT, timeout=110)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    run_id = (tmp_path / "wandb_id").read_text(encoding="utf-8")
    content = (folder / f"run-{run_id}.wandb").read_bytes()
    for expected in (b"loss/objective", b"distill/entropy_gap/by_position/00000", b"evaluation/accuracy/heldout"):
        assert expected in content
    assert b"tests" in content and json.dumps(7).encode() in content and b"gradient norm 3 at step 2" in content


@installed("wandb")
def test_weights_and_biases_without_a_key_is_one_line(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom opd.errors import ConfigError\n"
        "from tests.unit.trainer.loggers.test_loggers import chosen, write_two_steps\n"
        "try:\n    write_two_steps(chosen('wandb.mode=online'), Path(sys.argv[1]))\n"
        "except ConfigError as error:\n    sys.exit(error.message)"
    )
    home = {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin"}
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT, env=home, timeout=110, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith("loggers.wandb.mode=online: ") and "`wandb login`" in found.stderr
