"""Key names are a contract between versions, access rules and scripts: they are pinned here letter by letter."""

import re
from pathlib import Path

import pytest

import opd.queue
from opd.errors import InvalidRequestError
from opd.queue import keys
from opd.queue.keys import PoolKeys

LUA = Path(opd.queue.__file__).parent / "lua"
POOL = PoolKeys("qwen@0a1b")
GOLDEN = {
    "opd:{qwen@0a1b}:active": POOL.active,
    "opd:{qwen@0a1b}:wake": POOL.wake,
    "opd:{qwen@0a1b}:newcomers": POOL.newcomers,
    "opd:{qwen@0a1b}:limits": POOL.limits,
    "opd:{qwen@0a1b}:deficits": POOL.deficits,
    "opd:{qwen@0a1b}:ring": POOL.ring,
    "opd:{qwen@0a1b}:drain": POOL.drain,
    "opd:{qwen@0a1b}:counters": POOL.counters,
    "opd:{qwen@0a1b}:dead_tenants": POOL.dead_tenants,
    "opd:{qwen@0a1b}:info": POOL.info,
    "opd:{qwen@0a1b}:replicas": POOL.replicas,
    "opd:{qwen@0a1b}:replica:host-7": POOL.replica("host-7"),
    "opd:{qwen@0a1b}:requests:math": POOL.requests("math"),
    "opd:{qwen@0a1b}:entry:math": POOL.entry("math"),
    "opd:{qwen@0a1b}:inflight:math": POOL.inflight("math"),
    "opd:{qwen@0a1b}:dead:math": POOL.dead("math"),
    "opd:{qwen@0a1b}:body:math:00ff:run.0.1": POOL.body("math", "00ff", "run.0.1"),
    "opd:{qwen@0a1b}:reply:math:00ff:run.0.1": POOL.reply("math", "00ff", "run.0.1"),
    "opd:{qwen@0a1b}:replies:math:00ff": POOL.replies("math", "00ff"),
    "opd:{qwen@0a1b}:alive:math:00ff": POOL.alive("math", "00ff"),
    "opd:alias:qwen": keys.alias_key("qwen"),
}


@pytest.mark.parametrize("golden", sorted(GOLDEN))
def test_key_is_spelt_as_agreed(golden: str) -> None:
    assert GOLDEN[golden] == golden


def test_every_kind_of_key_is_filed_under_exactly_one_owner() -> None:
    kinds = {name.split(":")[2] for name in GOLDEN if "{" in name}
    assert kinds == keys.SHARED_NAMES | keys.POOL_NAMES | keys.TENANT_NAMES | {"replica"}
    assert len(keys.SHARED_NAMES) + len(keys.POOL_NAMES) + len(keys.TENANT_NAMES) + 1 == len(kinds)


def test_scripts_name_no_key_that_python_does_not_know() -> None:
    text = "\n".join(path.read_text(encoding="ascii") for path in sorted(LUA.glob("*.lua")))
    used = set(re.findall(r"\bkey\('([a-z_]+)'", text))
    assert used == keys.SHARED_NAMES | keys.TENANT_NAMES | (keys.POOL_NAMES - {"info", "replicas"})


@pytest.mark.parametrize("name", ["", "Math", "a:b", "a b", "x" * 64, "math\n", "{math}", "a_b"])
def test_names_that_could_reach_into_other_keys_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="tenant="):
        keys.check_tenant(name)
    with pytest.raises(InvalidRequestError, match="teacher="):
        keys.check_pool(name)


@pytest.mark.parametrize("pool", ["qwen", "qwen-2", "qwen@00ff"])
def test_pools_may_carry_a_fingerprint(pool: str) -> None:
    assert keys.check_pool(pool) == pool


@pytest.mark.parametrize("rollout_id", ["", "a b", "a\n", "x" * 201, "\u00e4"])
def test_rollout_ids_are_printable_and_bounded(rollout_id: str) -> None:
    with pytest.raises(InvalidRequestError, match="rollout_id="):
        keys.check_rollout_id(rollout_id)
