"""How much of everything do so many students need? `python -m benchmarks.capacity [--students 1000 ...]`

Arithmetic, no measurement: what was measured comes in as `Costs`, each figure with the benchmark that gave it, and what
only the reader can measure (tokens/s of a GPU, time of a step) as options. A student that scores so many tokens in a
second on average takes its share of every replica, every link and Redis; all else follows. The default load is the
paper's batch (64 prompts, 4 rollouts each, k = 16) with shorter responses. No rate of a GPU has been measured.
"""

import argparse
import math
from dataclasses import asdict, dataclass, fields

from benchmarks.report import show
from opd.queue.client_rules import MEMORY_FRACTION

GIB, KIB = 1 << 30, 1 << 10
# Far beyond any installation, and near enough to 1 that no product of all values leaves the range of a float.
_LEAST, _MOST = 1e-12, 1e12


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Measured; a run of the named benchmark on your machine gives yours."""

    link_bytes_per_token: float = 92.4
    """Trainer's or teacher's link, both directions, of a response token; `wire_bytes`, k = 16, float16."""
    redis_bytes_per_token: float = 184.4
    """Into and out of Redis together; `wire_bytes`, k = 16, float16."""
    redis_fixed_ms: float = 0.48
    """CPU time of Redis for a request, whatever its size; this and the next three by `request_cost`, k = 16, float16,
    two idle cores."""
    redis_ms_per_kib: float = 0.0026
    """More for each KiB of request and reply, as they pass the student's link."""
    replica_fixed_ms: float = 0.68
    """CPU time of the replica beside its model."""
    replica_ms_per_kib: float = 0.019
    """More for each KiB: decoding, checking, encoding."""

    def request_kib(self, response_tokens: float) -> float:
        """Request and reply of so many response tokens."""
        return response_tokens * self.link_bytes_per_token / KIB

    def redis_ms(self, kib: float) -> float:
        """CPU time of one request in Redis, which has one core for its commands."""
        return self.redis_fixed_ms + self.redis_ms_per_kib * kib

    def replica_ms(self, kib: float) -> float:
        """CPU time of one request in its replica, the model left out."""
        return self.replica_fixed_ms + self.replica_ms_per_kib * kib


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What the students do, and how fast a replica is. Example: `Load(students=8, step_s=60.0)`."""

    students: int = 1000
    rollouts_per_step: int = 256
    """Prompts of a step times rollouts of each."""
    prompt_tokens: int = 256
    """Mean, of one rollout."""
    response_tokens: int = 2048
    """Mean, of one rollout; only these travel back."""
    step_s: float = 300.0
    """Mean time from one optimizer step to the next, scoring included."""
    peak: float = 2.0
    """Students do not take turns: the busiest minute over the mean."""
    teacher_tokens_per_s: float = 10_000.0
    """Prompt and response tokens that one replica scores; measure yours with `gpu_score` or `score_throughput`."""
    gpus_per_replica: int = 1
    utilisation: float = 0.8
    """Share of its time that a replica is busy at the peak; the nearer to 1, the longer requests wait."""
    redis_gib: float = 16.0
    """maxmemory of one Redis."""
    redis_gbit_per_s: float = 10.0
    """Of its network, in each direction."""
    redis_utilisation: float = 0.6
    """Share of its core and of its network that a Redis is planned to use at the peak. The rest is for what no line
    foresees: rewriting its file, trainers that reconnect all at once, a machine on which all costs more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What it takes; rates at the peak."""

    requests_per_s: float
    scored_tokens_per_s: float
    """Prompt and response."""
    replicas: int
    gpus: int
    student_mbit_per_s: float
    """One student's link, both directions, on average."""
    redis_gbit_per_s: float
    """In and out of Redis, of all shards together."""
    redis_cores: float
    """Of command execution, of all shards together."""
    replica_overhead_cores: float
    """Of replicas, for everything that is not the model."""
    backlog_gib: float
    """Redis memory when every student has a whole step in the queue at once."""
    shards: int
    """Redis servers, each with one or more pools."""
    shards_by: str
    """What asks for so many: memory, network or cpu."""


def capacity(load: Load, costs: Costs | None = None) -> Need:
    """The arithmetic, the same as in docs/scaling.md; ValueError for a value that is none to calculate with."""
    costs = costs or Costs()
    for given in (load, costs):
        for field in fields(given):
            _check(field.name, getattr(given, field.name))
    for name in ("utilisation", "redis_utilisation"):
        if getattr(load, name) > 1:
            raise ValueError(f"{name}={getattr(load, name)}: is a share; give 1 or less")
    requests_per_s = load.peak * load.students * load.rollouts_per_step / load.step_s
    response_tokens_per_s = requests_per_s * load.response_tokens
    scored_tokens_per_s = requests_per_s * (load.prompt_tokens + load.response_tokens)
    replicas = math.ceil(scored_tokens_per_s / (load.teacher_tokens_per_s * load.utilisation))
    redis_bytes_per_s = response_tokens_per_s * costs.redis_bytes_per_token
    kib = costs.request_kib(load.response_tokens)
    redis_cores = requests_per_s * costs.redis_ms(kib) / 1000
    step_bytes = load.rollouts_per_step * load.response_tokens * costs.link_bytes_per_token
    backlog_bytes = load.students * step_bytes
    shards = {
        # Above that share `submit` refuses, so it is all that a queue may hold.
        "memory": backlog_bytes / (MEMORY_FRACTION * load.redis_gib * GIB),
        # In and out are two directions of one link.
        "network": redis_bytes_per_s / 2 * 8 / (load.redis_gbit_per_s * 1e9) / load.redis_utilisation,
        "cpu": redis_cores / load.redis_utilisation,
    }
    shards_by = max(shards, key=lambda name: shards[name])
    return Need(
        requests_per_s=requests_per_s,
        scored_tokens_per_s=scored_tokens_per_s,
        replicas=replicas,
        gpus=replicas * load.gpus_per_replica,
        student_mbit_per_s=step_bytes * 8 / load.step_s / 1e6,
        redis_gbit_per_s=redis_bytes_per_s * 8 / 1e9,
        redis_cores=redis_cores,
        replica_overhead_cores=requests_per_s * costs.replica_ms(kib) / 1000,
        backlog_gib=backlog_bytes / GIB,
        shards=math.ceil(shards[shards_by]),
        shards_by=shards_by,
    )


def _check(name: str, value: float) -> None:
    shown = f"{name}={str(value)[:40]}"
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{shown}: is not finite; give a number above 0")
    if value <= 0:
        raise ValueError(f"{shown}: give more than 0")
    if not _LEAST <= value <= _MOST:
        raise ValueError(f"{shown}: is out of all bounds; give {_LEAST:g} to {_MOST:g}")


def main() -> None:
    """Options are the fields of `Load` and `Costs`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.capacity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for cls in (Load, Costs):
        for name, value in asdict(cls()).items():
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    given = vars(parser.parse_args())
    load = Load(**{field.name: given[field.name] for field in fields(Load)})
    costs = Costs(**{field.name: given[field.name] for field in fields(Costs)})
    try:
        need = asdict(capacity(load, costs))
    except ValueError as error:
        parser.error(str(error))
    show(("what", "how much"), list(need.items()), {"load": asdict(load), "costs": asdict(costs), **need})


if __name__ == "__main__":
    main()
