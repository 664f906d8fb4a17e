"""The `opd` command as a user meets it: quick help, and one line for a mistake."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COMMANDS = (
    [], ["demo"], ["teacher"], ["teacher", "serve"], ["pool"], ["pool", "serve"], ["pool", "promote"], ["pool", "dead"],
    ["pool", "dead", "list"], ["pool", "dead", "show"], ["pool", "status"], ["redis"], ["tenants"], ["tenants", "add"],
    ["train"], ["eval"], ["continuation"], ["auroc"], ["score"], ["report"], ["preflight"], ["data"], ["cold-start"],
    ["doctor"], ["experiment"], ["experiment", "list"], ["experiment", "run"], ["experiment", "report"],
)  # fmt: skip


def opd(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "OPD_REDIS_URL"}
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=50, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom services.cli import app\n"
        f"try: app({[*command, '--help']!r})\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'grpc', 'redis', 'fastapi'} & set(sys.modules)\nassert not heavy, heavy"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=50, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "Usage" in found.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["pool", "serve", "teachers=['t']", "redis_url=redis://:sec[ret@127.0.0.1:1/0"],
        ["pool", "status", "t", "--once", "--redis-url", "redis://:sec[ret@127.0.0.1:1/0"],
        [
            "teacher", "serve", "model=testbed/models/student-base", "http.port=0", "grpc.port=0",
            "redis_url=redis://:sec[ret@127.0.0.1:1/0",
        ],
        [
            "train", "student.model=testbed/models/student-base", "data.files=['testbed/data/heldout.jsonl']",
            "run_dir=runs/never", "teacher.pool=t", "teacher.url=redis://:sec[ret@127.0.0.1:1/0",
        ],
    ],
    ids=["pool serve", "pool status", "teacher serve", "train"],
)  # fmt: skip
@pytest.mark.timeout(120)
def test_a_bracket_in_the_password_of_redis_is_one_line(arguments: list[str]) -> None:
    found = opd(*arguments)
    said = [text for text in found.stderr.splitlines() if text.strip()]
    assert found.returncode == 2 and "a bracket as %5B" in said[-1], found.stderr
    assert "Traceback" not in found.stderr and "sec[ret" not in found.stderr + found.stdout


def test_help_answers_at_once() -> None:
    """In processor time, so that a busy machine does not decide: importing torch alone takes seconds."""
    before = time.perf_counter(), os.times()
    assert opd("train", "--help").returncode == 0
    after = os.times()
    spent_s = after.children_user + after.children_system - before[1].children_user - before[1].children_system
    assert spent_s < 1.0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "student.modle=x"], "student.modle: no such key; did you mean model?"),
        (["train", "--config", "nowhere.toml"], "config nowhere.toml: cannot be read"),
        (["teacher", "serve", "model=/nowhere/at/all"], "/nowhere/at/all"),
        (["pool", "serve"], "teachers: is required"),
        (["pool", "dead", "list"], "redis_url: is not given"),
        (["pool", "dead", "list", "--redis-url", "redis://127.0.0.1:1/0"], "127.0.0.1:1"),
        (["demo", "--teacher", "nobody", "--run-dir", "runs/never"], "teacher=nobody: is not bundled"),
        (["preflight", "--student", "s", "--prompts", "p"], "teachers: is required"),
        (["preflight", "--student", "/nowhere", "--teachers", "a", "--prompts", "p"], "/nowhere"),
        (["eval", "/nowhere", "--data", "testbed/data/heldout.jsonl"], "/nowhere"),
        (["experiment", "run", "fig99"], "experiment fig99: there is none; choose all or one of fig02"),
        (["eval", "testbed/models/student-base", "--data", "no.jsonl"], "data no.jsonl: no such file"),
        (["eval", "testbed/models/student-base", "--data", "testbed/data/none"], "testbed/data/none: no such file"),
        (["auroc", "--student", "no/such/model", "--teacher", "t", "--data", "no.jsonl"], "no.jsonl: no such file"),
        (["continuation", "--student", "s", "--teacher", "t", "--data", "d", "--depths", "1,x"], "--depths 1,x"),
        (["report", "/nowhere"], "/nowhere"),
        (["score", "hi", "there", "--url", "http://x", "--tokenizer", "testbed/models/student-base"], "url=http://x"),
        (["score", "hi", "--url", "grpc://h:1"], "RESPONSE: is missing"),
        (["score", "no.jsonl", "--url", "grpc://h:1", "--out", "o.parquet"], "no.jsonl: no such"),
        (["pool", "status", "A b", "--once", "--redis-url", "redis://127.0.0.1:1/0"], "127.0.0.1:1"),
    ],
)
@pytest.mark.timeout(120)
def test_a_mistake_is_one_line(arguments: list[str], line: str) -> None:
    found = opd(*arguments)
    assert found.returncode in (1, 2)
    said = [text for text in found.stderr.splitlines() if text.strip()]
    assert line in said[-1], found.stderr
    assert "Traceback" not in found.stderr
