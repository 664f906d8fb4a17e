"""How the processes that torchrun started find each other, what they tell each other, and how they part.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without them a run is one process. Weights and
gradients travel over nccl between CUDA devices and over gloo between CPUs, control values over gloo in any case, so
that asking for a count never waits for a device. Every collective has a bounded time-out.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opd.errors import ConfigError, OpdError, RankLostError, first_line
from services.trainer.distributed.ranks import Alone, Ranks
from services.trainer.distributed.watch import RankWatch, store_connection
from services.trainer.memory import is_out_of_memory

_EXPLAIN_S = 3.0
_DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnvironment:
    """Who this process is among those of the run, as the launcher says."""

    rank: int
    num_ranks: int
    local_rank: int
    """Among the processes of this machine: the index of its CUDA device."""
    host: str
    port: int
    attempt: str = "0"
    """Counts up where torchrun starts all ranks again; its store outlives them."""

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> "RankEnvironment | None":
        """None where no launcher has set anything; `ConfigError` for half of it."""
        environ = os.environ if environ is None else environ
        if "RANK" not in environ and "WORLD_SIZE" not in environ:
            return None
        return cls(
            rank=_number(environ, "RANK"),
            num_ranks=_number(environ, "WORLD_SIZE"),
            local_rank=_number(environ, "LOCAL_RANK"),
            host=_text(environ, "MASTER_ADDR"),
            port=_number(environ, "MASTER_PORT"),
            attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )


class TorchRanks:
    """The ranks of a process group. Made by `joined_ranks`."""

    def __init__(self, environment: RankEnvironment, mesh: DeviceMesh, watch: RankWatch) -> None:
        self.rank = environment.rank
        self.num_ranks = environment.num_ranks
        self.mesh = mesh
        """One dimension, over all ranks."""
        self._watch = watch
        self._has_left = False

    def total(self, value: int) -> int:
        return self._reduced(value, dist.ReduceOp.SUM)

    def most(self, value: int) -> int:
        return self._reduced(value, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        longest = self.most(content.numel())
        padded = torch.full((longest,), ord(" "), dtype=torch.uint8)
        padded[: content.numel()] = content
        parts = [torch.empty_like(padded) for _ in range(self.num_ranks)]
        with self.in_step():
            dist.all_gather(parts, padded)
        return [json.loads(bytes(part.tolist())) for part in parts]

    def check(self) -> None:
        """`RankLostError` once another rank is known to be gone, or this one has left the others."""
        if self._watch.lost is not None:
            raise self._watch.lost
        if self._has_left:
            raise RankLostError(
                "this rank has left the others in the middle of a step, so nothing can be done together"
            )

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Around passes in which ranks wait for each other. Whoever leaves by an error has left for good."""
        self.check()
        try:
            yield
        except Exception as error:
            self._has_left = True
            if isinstance(error, RuntimeError) and not (isinstance(error, OpdError) or is_out_of_memory(error)):
                self._explain(error)
            raise

    def _explain(self, error: RuntimeError) -> None:
        """Raises `RankLostError` where a collective broke because another rank is gone; returns otherwise."""
        lost = self._watch.wait_lost(_EXPLAIN_S)
        if lost is None and "by peer" in str(error):
            # Its connection is closed: it has ended, however short ago.
            lost = RankLostError("another rank has ended in the middle of a step; its own last line says why")
        if lost is not None:
            raise lost from error

    def _reduced(self, value: int, operation: Any) -> int:
        tensor = torch.tensor(value, dtype=torch.int64)
        with self.in_step():
            dist.all_reduce(tensor, op=operation)
        return int(tensor)


@contextmanager
def joined_ranks(
    environment: RankEnvironment | None, *, device: str = "auto", timeout_s: float = 1800.0, silence_s: float = 60.0
) -> Iterator[Ranks]:
    """Joins the process group for as long as it is entered. An error that ends it is told to the others first.

    `timeout_s` bounds every collective, `silence_s` how long a rank may show no sign of life. `ConfigError` where a
    rank has no device of its own, `RankLostError` where the others do not come.
    """
    if environment is None or environment.num_ranks == 1:
        yield Alone()
        return
    place = rank_device(device, environment)
    with _told_as_lost(environment):
        store = _store(environment, timeout_s)
        prefix = f"opd-watch/{environment.attempt}"
        watch_store = store_connection(environment.host, environment.port, prefix, timeout_s)
    watch = RankWatch(watch_store, rank=environment.rank, num_ranks=environment.num_ranks, silence_s=silence_s)
    try:
        with _told_as_lost(environment):
            ranks = _join(environment, place, store, watch, timeout_s)
        yield ranks
        # Nobody leaves before all have come to their end, or the last ones would miss the first.
        dist.barrier() if place.type == "cpu" else dist.barrier(device_ids=[environment.local_rank])
    except BaseException as error:
        watch.announce(error)
        watch.close()
        _leave_at_once()
        raise
    watch.close()
    dist.destroy_process_group()


@contextmanager
def _told_as_lost(environment: RankEnvironment) -> Iterator[None]:
    """What PyTorch raises where ranks do not find each other, in one line."""
    try:
        yield
    except (dist.DistError, TimeoutError) as error:
        raise RankLostError(
            f"rank {environment.rank} does not reach the others by MASTER_ADDR={environment.host}, "
            f"MASTER_PORT={environment.port} ({first_line(error)[:160]}); start all ranks where they see each other"
        ) from error


def rank_device(device: str, environment: RankEnvironment) -> torch.device:
    """Each rank's own device: the one of its index on this machine."""
    if device not in _DEVICES:
        raise ConfigError(
            f"student.device={device}: {environment.num_ranks} processes need a device each; give auto, cuda or cpu"
        )
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if environment.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK={environment.local_rank}: this machine has {torch.cuda.device_count()} CUDA devices; start as "
            "many processes a machine (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", environment.local_rank)


def _join(
    environment: RankEnvironment, place: torch.device, store: Store, watch: RankWatch, timeout_s: float
) -> TorchRanks:
    is_cuda = place.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(place)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        store=store,
        rank=environment.rank,
        world_size=environment.num_ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    return TorchRanks(environment, init_device_mesh(place.type, (environment.num_ranks,)), watch)


def _store(environment: RankEnvironment, timeout_s: float) -> Store:
    """torchrun's own store, or without it one that rank 0 keeps."""
    has_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        environment.host,
        environment.port,
        environment.num_ranks,
        is_master=environment.rank == 0 and not has_launcher,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
    return PrefixStore(f"opd/{environment.attempt}", store)


def _leave_at_once() -> None:
    """Without a word to the others, who may be in the middle of a collective; closed connections end that one."""
    if dist.is_initialized():
        abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
        if abort is not None:
            abort()


def _number(environ: Mapping[str, str], name: str) -> int:
    text = _text(environ, name)
    if not text.isdigit():
        raise ConfigError(f"{name}={text}: is no number; start with torchrun, or unset it for a single process")
    return int(text)


def _text(environ: Mapping[str, str], name: str) -> str:
    text = environ.get(name, "")
    if not text:
        raise ConfigError(f"{name}: is not set, but other variables of a launcher are; start with torchrun")
    return text
