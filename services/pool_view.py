"""Tables of a pool's state for people, and the same as JSON for programs."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from opd.errors import OpdError
from opd.queue.dead_letters import DeadLetter
from opd.queue.status import PoolStatus
from opd.types import ScoreRequest
from services.teacher_server.pool import PoolWatch
from services.teacher_server.queue_access import QueueAccess

_WINDOW_S = 10.0
_MAX_IDS_SHOWN = 64
_PIPE_WIDTH = 240
_MIN_WIDTHS = {"dead id": 15, "tenant": 8, "fingerprint": 12}
"""What people copy from a table is not to be cut in a narrow window."""


class SpeedGauge:
    """Tokens per second of each pool over the last ten seconds, from its total of answered tokens."""

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[float, int]]] = {}

    def update(self, state: PoolStatus, now_s: float) -> float | None:
        """None until there are two looks to compare, or after the total began anew."""
        total = state.totals.get("completed_tokens", 0)
        seen = [(at, tokens) for at, tokens in self._seen.get(state.pool, []) if now_s - at <= _WINDOW_S]
        seen = [*seen, (now_s, total)] if not seen or total >= seen[-1][1] else [(now_s, total)]
        self._seen[state.pool] = seen
        (first_at, first), (last_at, last) = seen[0], seen[-1]
        return (last - first) / (last_at - first_at) if last_at > first_at else None


def print_status(access: QueueAccess, teachers: Sequence[str], *, as_json: bool) -> None:
    """`opd pool status --once` and `--json`; an unreachable Redis is the error it is."""
    states = asyncio.run(_read_once(access, teachers))
    if as_json:
        _print_json({"teachers": {name: dataclasses.asdict(state) for name, state in states.items()}})
        return
    _console().print(render(states, {}))


def watch_status(access: QueueAccess, teachers: Sequence[str], *, every_s: float) -> None:
    """`opd pool status`: until Ctrl-C; a Redis that goes away is said and waited for."""
    try:
        asyncio.run(_watch(access, teachers, every_s))
    except KeyboardInterrupt:
        return


async def _read_once(access: QueueAccess, teachers: Sequence[str]) -> dict[str, PoolStatus]:
    async with access.opened() as connection:
        return await PoolWatch(connection, teachers, cache_s=0.0).read()


async def _watch(access: QueueAccess, teachers: Sequence[str], every_s: float) -> None:
    gauge = SpeedGauge()
    async with access.opened() as connection:
        watch = PoolWatch(connection, teachers, cache_s=0.0)
        with Live(console=Console(), auto_refresh=False, screen=False) as live:
            while True:
                live.update(await _look(watch, gauge), refresh=True)
                await asyncio.sleep(every_s)


async def _look(watch: PoolWatch, gauge: SpeedGauge) -> RenderableType:
    try:
        states = await watch.read()
    except OpdError as error:
        if not error.retryable:
            raise
        return Text(f"{_clock()}  {error.message}", style="bold red")
    speeds = {name: gauge.update(state, time.monotonic()) for name, state in states.items()}
    return Group(render(states, speeds), Text(f"{_clock()}  Ctrl-C ends", style="dim"))


def render(states: dict[str, PoolStatus], speeds: dict[str, float | None]) -> RenderableType:
    """One block per teacher: its line of totals, its replicas, its tenants."""
    blocks: list[RenderableType] = []
    for name, state in states.items():
        if state.is_known:
            blocks += [_headline(name, state, speeds.get(name)), _replicas(state), _tenants(state), Text()]
        else:
            blocks += [_unknown(name, state), Text()]
    return Group(*blocks[:-1])


def _unknown(name: str, state: PoolStatus) -> Text:
    """A pool that is idle looks otherwise: it was served once."""
    text = _name(name, state)
    return text.append("   no such pool: nobody ever served or asked it; correct the name", style="not bold yellow")


def _headline(name: str, state: PoolStatus, speed: float | None) -> Text:
    text = _name(name, state)
    num_replicas = len(state.replicas)
    parts = [f"{num_replicas} replica{'' if num_replicas == 1 else 's'}"]
    parts.append(f"backlog {state.backlog_tokens:,} tokens in {state.backlog_entries:,} requests")
    if speed is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    if state.backlog_entries:
        parts.append(f"oldest {_age(state.oldest_age_s)}")
    text.append("   " + ", ".join(parts), style="not bold")
    if state.dead_letters:
        text.append(f", {state.dead_letters} dead letter{'' if state.dead_letters == 1 else 's'}", style="bold red")
    return text


def _name(name: str, state: PoolStatus) -> Text:
    text = Text(name, style="bold")
    return text if state.pool == name else text.append(f" -> {state.pool}", style="not bold")


def _replicas(state: PoolStatus) -> RenderableType:
    if not state.replicas:
        waits = ": requests wait" if state.backlog_entries else ""
        return Text(f"  no live replica{waits}", style="yellow" if waits else "dim")
    table = _table("replica", "fingerprint", "model", "engine", ">last sign of life")
    for replica in state.replicas:
        table.add_row(
            Text(replica.replica_id),
            replica.fingerprint[:12] or "?",
            Text(replica.model or "?"),
            replica.engine or "?",
            _age(replica.age_s),
        )
    return table


def _tenants(state: PoolStatus) -> RenderableType:
    if not state.tenants:
        return Text("  no tenant has requests", style="dim")
    table = _table(
        "tenant", ">backlog tokens", ">entries", ">in flight", ">oldest", ">cap tokens", ">weight", ">dead letters"
    )
    for tenant in state.tenants:
        table.add_row(
            tenant.tenant,
            f"{tenant.backlog_tokens:,}",
            f"{tenant.backlog_entries:,}",
            f"{tenant.leased_entries:,}",
            _age(tenant.oldest_age_s),
            "none" if tenant.cap_tokens is None else f"{tenant.cap_tokens:,}",
            f"{tenant.weight:g}",
            Text(str(tenant.dead_letters), style="bold red" if tenant.dead_letters else ""),
        )
    return table


def print_dead_letters(teacher: str, letters: Sequence[DeadLetter], *, as_json: bool) -> None:
    """`opd pool dead list`."""
    if as_json:
        _print_json({"teacher": teacher, "dead_letters": [dataclasses.asdict(letter) for letter in letters]})
        return
    console = _console()
    if letters:
        table = _table("tenant", "dead id", "put aside", "rollout", ">tokens", ">deliveries", "last replica")
        for letter in letters:
            table.add_row(
                letter.tenant,
                letter.dead_id,
                _when(letter.dead_id),
                Text(letter.rollout_id),
                f"{letter.num_tokens:,}",
                str(letter.num_deliveries),
                Text(letter.last_replica),
            )
        console.print(table)
    console.print(f"{len(letters)} dead letter{'' if len(letters) == 1 else 's'} in {teacher}", highlight=False)


def print_dead_letter(letter: DeadLetter, request: ScoreRequest, *, as_json: bool) -> None:
    """`opd pool dead show`: ids are cut to the first ones in the table and whole in JSON."""
    wants = {
        "num_candidates": 0 if request.candidate_token_ids is None else int(request.candidate_token_ids.shape[1]),
        "score_top_k": request.score_top_k,
        "wants_entropy": request.wants_entropy,
        "teacher_temperature": request.teacher_temperature,
        "teacher_fingerprint": request.teacher_fingerprint,
        "timeout_ms": request.timeout_ms,
    }
    ids = {
        "prompt_token_ids": request.prompt_token_ids.tolist(),
        "response_token_ids": request.response_token_ids.tolist(),
    }
    if as_json:
        _print_json(dataclasses.asdict(letter) | wants | ids)
        return
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in (dataclasses.asdict(letter) | {"put_aside": _when(letter.dead_id)} | wants).items():
        table.add_row(Text(name, style="dim"), Text(str(value)))
    for name, token_ids in ids.items():
        more = f" ... {len(token_ids)} in all" if len(token_ids) > _MAX_IDS_SHOWN else ""
        table.add_row(Text(name, style="dim"), Text(" ".join(map(str, token_ids[:_MAX_IDS_SHOWN])) + more))
    _console().print(table)


def _table(*columns: str) -> Table:
    """A plain table; a column whose name begins with > holds numbers and stands to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for column in columns:
        name = column.removeprefix(">")
        justify: JustifyMethod = "right" if column.startswith(">") else "left"
        table.add_column(name, justify=justify, min_width=_MIN_WIDTHS.get(name), overflow="fold")
    return table


def _console() -> Console:
    """As wide as the window; a pipe has none, and whoever reads it wants whole lines."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_WIDTH)


def _age(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _when(dead_id: str) -> str:
    return f"{datetime.fromtimestamp(int(dead_id.partition('-')[0]) / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _clock() -> str:
    return f"{datetime.now().astimezone():%H:%M:%S}"


def _print_json(value: Any) -> None:
    Console(soft_wrap=True).print(json.dumps(value, indent=2), highlight=False, markup=False)
