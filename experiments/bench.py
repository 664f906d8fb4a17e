"""The bench that arms run on: one Redis, one teacher process per teacher asked for, one trainer process per run.

Teachers are started when an arm first asks for them and stay for the arms that follow. What is finished is in the store
and never made again; what was interrupted goes on from its last checkpoint. One bench works in a folder at a time, and
it waits for a trainer that an earlier one, killed, has left behind.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from experiments.arms import Arm, Command, Evaluation, Model, name_of
from experiments.keys import BASE, fingerprint, settings_of
from experiments.store import MADE, Store
from opd.errors import ConfigError, InternalError
from opd.files import whole_file
from opd.queue.embedded import EmbeddedRedis
from services.trainer.run_log import read_steps
from testbed.processes import Child, Processes
from testbed.stack import DATA, start_teacher

_ORPHAN_S = 120.0
_POLL_S = 0.25
_CHECKPOINT_STEPS = 8
_EVALUATIONS_AT_ONCE = 2

Tell = Callable[[str, float], None]
"""Told what is being done and how much of it is, 0 to 1."""


@dataclass(kw_only=True, slots=True)
class Bench:
    """Made by `open_bench`, which closes what it holds."""

    store: Store
    redis_url: str
    session: Path
    """Logs and ready files of this session."""
    processes: Processes
    _teachers: dict[str, Child] = field(default_factory=dict)
    """By the name of their pool."""

    def train(self, arm: Arm, seed: int, tell: Tell) -> None:
        """Makes a run, or goes on with it; `InternalError` with the trainer's last words where it fails."""
        folder = self.store.run_folder(arm, seed)
        if not any((folder / "checkpoints").glob("step-*")):
            shutil.rmtree(folder, ignore_errors=True)
        arguments = [f"{name}={json.dumps(value)}" for name, value in self._overrides(arm, seed, folder).items()]
        trainer = self.processes.start(
            f"train-{folder.name}", ["-m", "services.trainer", "--config", str(BASE), "--resume", *arguments]
        )
        num_steps: int = settings_of(arm)["steps"]
        while trainer.process.poll() is None:
            tell(f"training {name_of(arm)}, seed {seed}", len(read_steps(folder)) / num_steps)
            time.sleep(_POLL_S)
        _check_end(trainer)

    def evaluate(self, jobs: Sequence[tuple[Model, Evaluation, int | None]], tell: Tell) -> None:
        """Grades the models that are not graded yet, some at a time, each in a process of its own."""
        places = {self.store.evaluation_file(*job): job for job in jobs}
        waiting = [(place, job) for place, job in places.items() if not place.is_file()]
        num_jobs, running = len(waiting), list[tuple[Child, Path]]()
        while waiting or running:
            while waiting and len(running) < _EVALUATIONS_AT_ONCE:
                place, job = waiting.pop(0)
                running.append((self._start_evaluation(*job, place), place))
            tell("evaluating", 1 - (len(waiting) + len(running)) / num_jobs)
            time.sleep(_POLL_S)
            for child, place in [entry for entry in running if entry[0].process.poll() is not None]:
                running.remove((child, place))
                _check_end(child)
                result = json.loads(_printed(place).read_text(encoding="utf-8"))["results"][0]
                _write(place, result)
                _printed(place).unlink()

    def make(self, command: Command, tell: Tell) -> None:
        """Runs a command of `opd` into a folder of its own; the folder counts once the command has ended well."""
        folder = self.store.command_folder(command)
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "student": self.store.model_folder(command.student),
            "teacher": self.store.model_folder(command.teacher),
            "samples": self.store.folder / "samples",
            "pool": self.pool(command.teacher) if any("{pool}" in part for part in command.arguments) else "",
            "redis_url": self.redis_url,
            "data": DATA,
            "output": folder,
        }
        arguments = [part.format(**values) for part in command.arguments]
        child = self.processes.start(f"{command.name}-{folder.name}", ["-m", "services.cli", command.name, *arguments])
        while child.process.poll() is None:
            tell(f"opd {command.name}", 0.0)
            time.sleep(_POLL_S)
        _check_end(child)
        if not (folder / command.product).exists():
            raise InternalError(f"opd {command.name} left no {command.product} in {folder}; see {child.log_path}")
        _write(folder / MADE, {"command": command.name, "arguments": list(command.arguments)})

    def pool(self, teacher: Model) -> str:
        """The name under which a teacher is served; it is started where it is not running."""
        name = teacher if isinstance(teacher, str) else f"made-{fingerprint(teacher)}"
        running = self._teachers.get(name)
        if running is None or running.process.poll() is not None:
            model = self.store.model_folder(teacher)
            self._teachers[name] = start_teacher(self.processes, self.session / name, self.redis_url, name, model)
        return name

    def _overrides(self, arm: Arm, seed: int, folder: Path) -> dict[str, object]:
        return {
            "student.model": str(self.store.model_folder(arm.student)),
            **({"teacher.pool": self.pool(arm.teacher), "teacher.url": self.redis_url} if arm.teacher else {}),
            "data.files": [str(DATA / name) for name in arm.data],
            "run_dir": str(folder),
            "seed": seed,
            "log.level": "warning",
            "http.enabled": False,
            "student.max_micro_batch_tokens": 4096,
            "checkpoint.every_steps": _CHECKPOINT_STEPS,
            "checkpoint.keep_last": 1,
            **arm.settings,
        }

    def _start_evaluation(self, model: Model, evaluation: Evaluation, seed: int | None, place: Path) -> Child:
        place.parent.mkdir(parents=True, exist_ok=True)
        options = {
            "data": DATA / evaluation.data,
            "num-samples": evaluation.num_samples,
            "max-problems": evaluation.num_problems,
            "temperature": evaluation.temperature,
            "top-p": evaluation.top_p,
            "max-response-tokens": evaluation.max_response_tokens,
            "device": "cpu",
            "cache": self.store.folder / "samples",
            "output": _printed(place),
        } | ({"template": evaluation.template} if evaluation.template else {})
        arguments = [f"--{name}={value}" for name, value in options.items()]
        folder = self.store.model_folder(model, seed)
        return self.processes.start(f"eval-{place.stem}", ["-m", "services.cli", "eval", str(folder), *arguments])


@contextmanager
def open_bench(folder: Path) -> Iterator[Bench]:
    """A bench in `folder`; everything it started is gone when the context ends, however it ends."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"work_dir={folder}: other experiments run in it; wait for them or choose another"
            ) from None
        _await_orphans(folder)
        session = folder / "session"
        shutil.rmtree(session, ignore_errors=True)
        with (
            # A Redis that is still ending lives in the folder of the session before.
            EmbeddedRedis(session / f"redis-{os.getpid()}") as redis,
            Processes(log_dir=session / "logs") as processes,
        ):
            yield Bench(store=Store(folder=folder), redis_url=redis.url, session=session, processes=processes)


def _await_orphans(folder: Path) -> None:
    """Trainers of a killed bench save their last step before they end, and must not do so under a new one."""
    deadline = time.monotonic() + _ORPHAN_S
    while orphans := _orphans(folder):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"work_dir={folder}: process {orphans[0]} of an earlier session still writes to it; end it"
            )
        time.sleep(_POLL_S)


def _orphans(folder: Path) -> list[int]:
    """Trainers, teachers, evaluations that name the folder, other than ourselves."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"-m\0services." in command and os.fsencode(folder) + b"/" in command and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


def _check_end(child: Child) -> None:
    code = child.process.returncode
    if code != 0:
        raise InternalError(f"{child.name} ended with code {code}: {child.last_line()} (its log is {child.log_path})")


def _printed(place: Path) -> Path:
    """Where `opd eval` leaves all that it found, of which one result is kept."""
    return place.with_name(f".{place.name}.printed")


def _write(path: Path, content: object) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
