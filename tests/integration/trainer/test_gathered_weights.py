"""What ranks do with whole weights, each by itself: completing their rollouts, and writing versions for an engine."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.trainer.tiny_training import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[3]
WORKER = Path(__file__).with_name("gathered_worker.py")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(folder: Path, name: str, *more: str, ranks: int = 1, is_tied: bool = True) -> list[dict[str, Any]]:
    """What every rank has found."""
    out = folder / name
    out.mkdir()
    for seed, of in ((1, "student"), (2, "teacher")):
        tiny_model(seed, tie_word_embeddings=is_tied).save_pretrained(folder / of)
        tiny_tokenizer().save_pretrained(folder / of)
    launcher = TORCHRUN if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(folder / "student"), str(folder / "teacher"), str(out), *more],
        env=ENV,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_ranks_complete_and_publish_by_themselves_what_one_process_would(tmp_path: Path, is_tied: bool) -> None:
    (alone,) = run(tmp_path, "alone", is_tied=is_tied)
    both = run(tmp_path, "both", ranks=2, is_tied=is_tied)
    # A pass for each rollout: a rank that asked the other for weights would wait for ever.
    assert [len(found["rollouts"]) for found in both] == [4, 8]
    assert all(found["in_shards"] and not found["error"] for found in both)
    completed = both[0]["rollouts"] | both[1]["rollouts"]
    assert completed.keys() == alone["rollouts"].keys()
    for name, expected in alone["rollouts"].items():
        for ours, theirs in zip(completed[name], expected, strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-4)
        assert not any(math.isnan(value) for value in completed[name][2])
    assert both[0]["norms"] == both[1]["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    for step in (1, 2):
        trained = weights(tmp_path / f"both/checkpoints/step-{step:06d}")
        for found in both:
            version = Path(found["folder"]) / f"version-{step}"
            written = weights(version)
            assert written.keys() == trained.keys() and ("lm_head.weight" in written) is not is_tied
            assert all(torch.equal(written[name], value) for name, value in trained.items())
            mark = json.loads((version / "complete.json").read_text())
            assert mark["version"] == step and mark["sizes"] and (version / "config.json").is_file()
    moved = weights(Path(both[1]["folder"]) / "version-2")
    assert all(not torch.equal(moved[name], value) for name, value in weights(tmp_path / "student").items())


def test_a_rank_that_cannot_publish_is_an_error_of_all_and_they_stay_together(tmp_path: Path) -> None:
    both = run(tmp_path, "both", "--refuse", "1", ranks=2)
    told, heard = both[1]["error"], both[0]["error"]
    # No error of ours, and yet one that all can go on from alike.
    assert told.startswith("InternalError: FileNotFoundError: ")
    assert heard == told.replace(": ", ": rank 1: ", 1)
    # The step was taken, and is saved by both.
    assert (tmp_path / "both/checkpoints/step-000002").is_dir()
    assert both[0]["in_shards"] and both[1]["in_shards"]
    for found in both:
        assert found["worst"]["rank"] == 1 and math.isnan(found["worst"]["drift"])
