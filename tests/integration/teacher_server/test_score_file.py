"""`opd score FILE` against a real teacher, over gRPC and the queue, and killed in the middle."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.teacher_server.conftest import ROOT, StartTeacher
from tests.unit.teacher_server.tiny_teachers import make_request, reference_scores

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "services.cli", "score", *map(str, arguments), "--teacher", "tiny", "--top-k", "5"]


def score(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )


def write_ids(path: Path, num_rows: int) -> Path:
    requests = [make_request(seed, num_prompt=4, num_response=20) for seed in range(num_rows)]
    rows = [{"prompt": r.prompt_token_ids.tolist(), "response": r.response_token_ids.tolist()} for r in requests]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_values_are_the_teachers(
    start_teacher: StartTeacher, teacher_folder: Path, tmp_path: Path, suffix: str
) -> None:
    note = start_teacher().wait_ready()
    source = write_ids(tmp_path / f"a.{suffix}", 5)
    found = score(source, "--out", tmp_path / "out.parquet", "--url", f"grpc://127.0.0.1:{note['grpc_port']}")
    assert found.returncode == 0, found.stderr
    assert "5 scored" in found.stderr
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    for seed, row in enumerate(rows):
        request = make_request(seed, num_prompt=4, num_response=20, score_top_k=5)
        expected = reference_scores(teacher_folder, request)
        for name in ("sampled_logprobs", "topk_token_ids", "topk_logprobs", "entropy"):
            np.testing.assert_allclose(row[name], getattr(expected, name), atol=1e-4, err_msg=name)


def test_a_run_killed_in_the_middle_goes_on_and_ends_the_same(
    start_teacher: StartTeacher, redis_url: str, tmp_path: Path
) -> None:
    start_teacher(f"redis_url={redis_url}").wait_ready()
    source, out = write_ids(tmp_path / "a.jsonl", 300), tmp_path / "out.parquet"
    told = ("--url", redis_url, "--batch-invariant", "--rows-per-part", 4, "--max-in-flight", 2)
    process = subprocess.Popen(
        command(source, "--out", out, *told), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    third = tmp_path / "out.parquet.parts/part-000002.parquet"
    give_up_at = time.monotonic() + 90
    while not third.exists():
        assert process.poll() is None and time.monotonic() < give_up_at
        time.sleep(0.005)
    process.kill()
    process.wait(10)
    assert not out.exists()
    resumed = score(source, "--out", out, *told)
    assert resumed.returncode == 0, resumed.stderr
    assert "300 scored" in resumed.stderr and "of them by an earlier run" in resumed.stderr
    whole = score(source, "--out", tmp_path / "whole.parquet", *told)
    assert whole.returncode == 0, whole.stderr
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "whole.parquet"))
    again = score(source, "--out", out, *told)
    assert "300 of them by an earlier run" in again.stderr
