"""The services of the demo as real processes on loopback: a Redis, a teacher, a trainer.

Redis listens on a Unix socket in the run folder, the teacher on free ports, so that nothing collides with what runs
already.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opd.errors import InternalError
from opd.queue.embedded import EmbeddedRedis
from testbed.processes import Child, Processes

MODELS = Path(__file__).parent / "models"
DATA = Path(__file__).parent / "data"
_READY_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """What a trainer needs to know."""

    redis_url: str
    pool: str
    processes: Processes


@contextmanager
def connected(run_dir: Path, redis_url: str, pool: str) -> Iterator[Stack]:
    """A Redis and a teacher that others have started."""
    with Processes(log_dir=run_dir / "logs") as processes:
        yield Stack(redis_url=redis_url, pool=pool, processes=processes)


@contextmanager
def launched(run_dir: Path, pool: str) -> Iterator[Stack]:
    """A Redis and a bundled teacher of our own; both are gone when the context ends, however it ends."""
    with EmbeddedRedis(run_dir / "redis") as redis, Processes(log_dir=run_dir / "logs") as processes:
        start_teacher(processes, run_dir, redis.url, pool)
        yield Stack(redis_url=redis.url, pool=pool, processes=processes)


def start_teacher(processes: Processes, run_dir: Path, redis_url: str, pool: str, model: Path | None = None) -> Child:
    """Serves a model, `testbed/models/<pool>` where none is given, as `pool` and waits until it takes requests."""
    run_dir.mkdir(parents=True, exist_ok=True)
    ready_file = run_dir / "teacher.json"
    ready_file.unlink(missing_ok=True)
    teacher = processes.start(
        f"teacher-{pool}",
        [
            *("-m", "services.teacher_server", f"model={model or MODELS / pool}", f"teacher={pool}"),
            *(f"redis_url={redis_url}", "--ready-file", str(ready_file)),
        ],
    )
    processes.wait_until(teacher, ready_file.is_file, _READY_S)
    if json.loads(ready_file.read_text(encoding="utf-8"))["pid"] != teacher.process.pid:
        raise InternalError(f"{ready_file}: was written by another process; give the demo a run folder of its own")
    return teacher


def train(stack: Stack, overrides: Sequence[str], config: Path) -> None:
    """Runs the trainer to its end with our standard error, so that its progress is seen; raises what it died of."""
    trainer = stack.processes.start(
        "trainer", ["-m", "services.trainer", "--config", str(config), *overrides], shows_progress=True
    )
    code = trainer.process.wait()
    if code != 0:
        raise InternalError(
            f"the trainer ended with code {code}; what it said stands above, its run is in the run folder"
        )


def latest_checkpoint(run_dir: Path) -> Path:
    """The Hugging Face folder the trainer left."""
    return max((run_dir / "checkpoints").glob("step-*"), key=lambda path: int(path.name.rpartition("-")[2]))
