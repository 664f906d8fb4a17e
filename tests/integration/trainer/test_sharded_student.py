"""A student in shards over two processes and gloo: the same training as in one, and one end for both."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd.types import Rollout, ScoreRequest
from services.trainer.batch import ScoredRollout
from services.trainer.probe import StoredProbe, write_probe
from services.trainer.rollout.base import SamplingParams
from services.trainer.rollout.transformers_engine import TransformersEngine
from tests.unit.trainer.tiny_training import EOS, NUM_IDS, exact_scores, step_requests, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[3]
WORKER = Path(__file__).with_name("sharded_worker.py")
NUM_STEPS, NUM_PROMPTS, PER_PROMPT, K = 3, 5, 2, 6
SPARSE = {"score_top_k": K}
DENSE = {"kind": "sampled_token", "score_top_k": K}
LORA = {"rank": 3, "alpha": 6.0, "target_modules": ["q_proj", "o_proj", "down_proj"]}
# A whole layer stays as it is, behind the adapters or before them. Of one row of A the second rank has none.
FIRST_LAYER = LORA | {"rank": 1, "target_modules": ["layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"]}
LAST_LAYER = LORA | {"target_modules": ["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"]}
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def recorded(student: Any, teacher: Any, step: int) -> list[ScoredRollout]:
    """Rollouts of a step with the teacher's scores."""
    engine = TransformersEngine(student, eos_token_ids=[EOS], num_defined_ids=NUM_IDS, score_top_k=K, max_slots=4)
    requests = step_requests(step, range(NUM_PROMPTS * PER_PROMPT), num_prompts=NUM_PROMPTS, per_prompt=PER_PROMPT)
    rollouts = engine.sample(requests, SamplingParams(max_response_tokens=14))
    return [ScoredRollout(rollout=one, scores=exact_scores(teacher, _request(one))) for one in rollouts]


def _request(rollout: Rollout) -> ScoreRequest:
    return ScoreRequest(
        rollout_id=rollout.rollout_id,
        tenant="t",
        teacher="t",
        prompt_token_ids=rollout.prompt_token_ids,
        response_token_ids=rollout.response_token_ids,
        candidate_token_ids=rollout.topk_token_ids,
        score_top_k=K,
        wants_entropy=True,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plan for the worker, to be completed by `plan`."""
    return tmp_path / "recorded"


def plan(folder: Path, objective: dict[str, Any], *, is_tied: bool = False, **changes: Any) -> None:
    """Writes the model, the rollouts of three steps, and how to train on them."""
    student = tiny_model(1, tie_word_embeddings=is_tied)
    student.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    teacher = tiny_model(2)
    for step in range(NUM_STEPS):
        rollouts = recorded(student, teacher, step)
        write_probe(
            folder / f"rollouts-{step}.npz", StoredProbe(objective="recorded", step=step + 1, rollouts=rollouts)
        )
    settings = {"objective": objective, "gradient_checkpointing": False, "reduces_each_round": True, "max_norm": 0.05}
    (folder / "plan.json").write_text(json.dumps(settings | changes))


def command(folder: Path, out: Path, steps: range, *more: str, ranks: int = 1) -> list[str]:
    out.mkdir(exist_ok=True)
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, str(WORKER), str(folder), str(out), str(steps.start), str(steps.stop), *more]


def train(folder: Path, out: Path, steps: range, *, ranks: int = 1) -> list[dict[str, Any]]:
    done = subprocess.run(
        command(folder, out, steps, ranks=ranks), env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: list[dict[str, Any]] = json.loads((out / "result.json").read_text())
    return result


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["losses"].keys() == theirs["losses"].keys()
        # How much is padded depends on who has which rollouts.
        compared = {name: value for name, value in theirs["losses"].items() if not name.startswith("timing/")}
        for name, value in compared.items():
            assert ours["losses"][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-5)


def weights(out: Path, step: int) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoints" / f"step-{step:06d}")
    assert model.config.architectures == ["Qwen3ForCausalLM"]
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def assert_same_adapters(found: Path, expected: Path) -> None:
    name = "checkpoints/step-000003/adapter/adapter_model.safetensors"
    ours, theirs = load_file(found / name), load_file(expected / name)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(ours[key], value, rtol=0, atol=2e-5, msg=key)


@pytest.mark.parametrize(
    ("objective", "is_tied", "changes"),
    [
        (SPARSE, False, {}),
        (SPARSE, True, {"reduces_each_round": False}),
        (DENSE, False, {"gradient_checkpointing": True, "reduces_each_round": False}),
        (DENSE, True, {"gradient_checkpointing": True}),
    ],
    ids=["sparse-untied", "sparse-tied-once", "dense-untied-recomputed-once", "dense-tied-recomputed"],
)
def test_two_ranks_train_as_one_process_does(
    folder: Path, tmp_path: Path, objective: dict[str, Any], is_tied: bool, changes: dict[str, Any]
) -> None:
    plan(folder, objective, is_tied=is_tied, **changes)
    alone = train(folder, tmp_path / "alone", range(NUM_STEPS))
    both = train(folder, tmp_path / "both", range(NUM_STEPS), ranks=2)
    assert_same(both, alone)
    assert alone[0]["losses"]["loss/objective"] != pytest.approx(alone[2]["losses"]["loss/objective"], rel=1e-3)
    # Ranks have different numbers of micro-batches, so some rounds were idle on one of them.
    assert any(len(set(step["micro_batches"])) == 2 for step in both)
    assert all(step["norm"] > 0.05 for step in alone)  # The gradient was clipped, after the division.
    torch.testing.assert_close(weights(tmp_path / "both", 3), weights(tmp_path / "alone", 3), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(folder: Path, tmp_path: Path, first: int, then: int) -> None:
    plan(folder, SPARSE, is_tied=True)
    whole = train(folder, tmp_path / "whole", range(NUM_STEPS))
    begun = train(folder, tmp_path / "cut", range(1), ranks=first)
    gone_on = train(folder, tmp_path / "cut", range(1, NUM_STEPS), ranks=then)
    assert_same(begun + gone_on, whole)
    torch.testing.assert_close(weights(tmp_path / "cut", 3), weights(tmp_path / "whole", 3), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        (LORA, {"is_tied": True}),
        (LORA, {"gradient_checkpointing": True, "reduces_each_round": False}),
        (FIRST_LAYER, {"gradient_checkpointing": True}),
        (LAST_LAYER, {"is_tied": True, "reduces_each_round": False}),
    ],
    ids=["tied", "recomputed-once", "first-layer-recomputed", "last-layer-tied-once"],
)
def test_adapters_train_in_shards_as_in_one_process(
    folder: Path, tmp_path: Path, lora: dict[str, Any], changes: dict[str, Any]
) -> None:
    plan(folder, SPARSE, lora=lora, **changes)
    alone = train(folder, tmp_path / "alone", range(NUM_STEPS))
    both = train(folder, tmp_path / "both", range(NUM_STEPS), ranks=2)
    assert_same(both, alone)
    assert any(len(set(step["micro_batches"])) == 2 for step in both)
    assert_same_adapters(tmp_path / "both", tmp_path / "alone")
    # What anybody loads is the base and the adapter, or the two as one; no other tensor was trained.
    checkpoint = tmp_path / "both/checkpoints/step-000003"
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapted = PeftModel.from_pretrained(base, checkpoint / "adapter").merge_and_unload()
    merged = torch.cat([parameter.detach().flatten() for parameter in adapted.parameters()])
    assert torch.equal(weights(tmp_path / "both", 3), merged)
    optimizer = load_file(checkpoint / "trainer/optimizer.safetensors")
    assert optimizer and all(".lora_" in name for name in optimizer)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_adapters_go_on_with_another_number_of_ranks(folder: Path, tmp_path: Path, first: int, then: int) -> None:
    plan(folder, DENSE, lora=LORA | {"rank": 1})
    whole = train(folder, tmp_path / "whole", range(NUM_STEPS))
    begun = train(folder, tmp_path / "cut", range(1), ranks=first)
    gone_on = train(folder, tmp_path / "cut", range(1, NUM_STEPS), ranks=then)
    assert_same(begun + gone_on, whole)
    assert_same_adapters(tmp_path / "cut", tmp_path / "whole")


def test_a_disk_that_refuses_adapters_is_the_end_of_both_ranks(folder: Path, tmp_path: Path) -> None:
    plan(folder, SPARSE, lora=LORA)
    out = tmp_path / "out"
    args = command(folder, out, range(1), ranks=2)
    # A file is where checkpoints belong.
    (out / "checkpoints").touch()
    done = subprocess.run(args, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    reason = f"checkpoint {out}/checkpoints/step-000001: cannot be written (Not a directory)"
    assert f"CheckpointError: {reason}" in done.stderr
    assert f"CheckpointError: rank 0: {reason}" in done.stderr


@pytest.mark.parametrize("whom", [0, 1])
def test_a_typed_error_of_one_rank_is_the_end_of_all(folder: Path, tmp_path: Path, whom: int) -> None:
    plan(folder, SPARSE)
    args = command(folder, tmp_path / "out", range(NUM_STEPS), "--fail", str(whom), ranks=2)
    done = subprocess.run(args, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "NonFiniteError: rollout r-1 has a score that is not finite" in done.stderr
    assert f"NonFiniteError: rank {whom}: rollout r-1 has a score that is not finite" in done.stderr
    assert _living(tmp_path / "out") == []


def test_a_rank_that_runs_out_of_memory_alone_does_not_wait_for_the_others(folder: Path, tmp_path: Path) -> None:
    plan(folder, SPARSE)
    out = tmp_path / "out"
    begun = time.monotonic()
    args = command(folder, out, range(NUM_STEPS), "--leave", "1")
    ranks = [_by_hand(args, out, rank) for rank in range(2)]
    # Collectives wait for 60 s.
    assert [rank.wait(50) for rank in ranks] == [1, 1]
    assert time.monotonic() - begun < 50
    assert "RankLostError: this rank has left the others" in (out / "stderr-1").read_text()
    said = (out / "stderr-0").read_text()
    assert "RankLostError" in said and "Traceback" not in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize("has_launcher", [True, False])
def test_a_rank_that_is_killed_takes_the_other_with_it(folder: Path, tmp_path: Path, has_launcher: bool) -> None:
    plan(folder, SPARSE)
    out = tmp_path / "out"
    begun = time.monotonic()
    if has_launcher:
        args = command(folder, out, range(NUM_STEPS), "--kill", "1", ranks=2)
        assert subprocess.run(args, env=ENV, cwd=ROOT, capture_output=True, timeout=60).returncode != 0
    else:
        args = command(folder, out, range(NUM_STEPS), "--kill", "1")
        first, second = (_by_hand(args, out, rank) for rank in range(2))
        assert second.wait(60) < 0
        assert first.wait(30) == 1
        assert "RankLostError" in (out / "stderr-0").read_text()
    assert time.monotonic() - begun < 60
    assert _living(out) == []
    # What was whole before is still there.
    assert weights(out, 1).isfinite().all()


def test_a_rank_that_hangs_is_missed_by_the_others(folder: Path, tmp_path: Path) -> None:
    """It is stopped, so its connections stay open and no collective breaks by itself."""
    plan(folder, SPARSE)
    out = tmp_path / "out"
    args = command(folder, out, range(NUM_STEPS), "--hang", "1")
    first, second = (_by_hand(args, out, rank) for rank in range(2))
    try:
        _wait_for(out / "checkpoints" / "step-000001")
        second.send_signal(signal.SIGSTOP)
        # Silence for 5 s, then 10 s to end by itself.
        assert first.wait(40) == 1
        assert "rank 1 has been silent for 5 s" in (out / "stderr-0").read_text()
    finally:
        second.kill()
        second.wait(10)


def _by_hand(args: list[str], out: Path, rank: int) -> subprocess.Popen[bytes]:
    """A rank without torchrun: rank 0 keeps the store."""
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            (out / "port").write_text(str(probe.getsockname()[1]))
    env = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": (out / "port").read_text()}
    with (out / f"stderr-{rank}").open("wb") as stderr:
        return subprocess.Popen(args, env=ENV | env, cwd=ROOT, stderr=stderr)


def _wait_for(path: Path, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.1)


def _living(out: Path) -> list[str]:
    """Ranks that are still there a moment after the run."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        living = [path.name for path in out.glob("pid-*") if _runs(int(path.read_text()))]
        if not living:
            return []
        time.sleep(0.2)
    return living


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
