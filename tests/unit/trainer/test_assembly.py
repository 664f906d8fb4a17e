"""What is refused before a run starts, by the real parts, with a Redis of its own and no teacher."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.errors import CheckpointError, ConfigError, TeacherUnavailableError
from opd.queue.embedded import EmbeddedRedis
from opd.settings import load_settings
from services.trainer.assembly import assemble
from services.trainer.checkpoint import CheckpointStore, TrainerState
from services.trainer.config import TrainSettings
from services.trainer.probe import PROBE_FILE
from services.trainer.run_log import EVENTS_FILE, RunLog, read_steps
from services.trainer.stop import StopSignal
from services.trainer.student import StudentOptimizer
from tests.unit.trainer.tiny_training import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with `student/` and `prompts.jsonl`, and the URL of a queue."""
    folder = tmp_path_factory.mktemp("world")
    tiny_model(1).save_pretrained(folder / "student")
    tiny_tokenizer().save_pretrained(folder / "student")
    rows = [{"prompt": [{"role": "user", "content": f"w{2 + i}"}], "data_source": "tiny"} for i in range(8)]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    with EmbeddedRedis(folder / "redis") as redis:
        yield folder, redis.url


def refuse(world: tuple[Path, str], run_dir: Path, *overrides: str, resume: bool = False) -> Any:
    folder, url = world
    settings = load_settings(
        TrainSettings,
        None,
        [
            f"student.model={folder / 'student'}",
            f'data.files=["{folder / "prompts.jsonl"}"]',
            f"teacher.url={url}",
            "teacher.wait_s=0",
            f"run_dir={run_dir}",
            "rollout.prompts_per_step=2",
            "rollout.max_prompt_tokens=20",
            "rollout.max_response_tokens=16",
            "objective.score_top_k=6",
            *overrides,
        ],
    )
    before = threading.active_count()
    try:
        assemble(settings, StopSignal(), resume=resume)
    finally:
        assert threading.active_count() == before


def test_a_student_folder_that_is_not_there(world: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^model {tmp_path}/nothing: no such folder"):
        refuse(world, tmp_path / "run", f"student.model={tmp_path}/nothing")


def test_a_student_with_broken_weights(world: tuple[Path, str], tmp_path: Path) -> None:
    tiny_model(1).save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ConfigError, match=r"model\.safetensors is broken"):
        refuse(world, tmp_path / "run", f"student.model={tmp_path}/broken")


def test_a_prompt_file_that_is_not_there(world: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.jsonl: no such file"):
        refuse(world, tmp_path / "run", f'data.files=["{tmp_path}/no.jsonl"]')


def test_a_context_too_small_for_the_run(world: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^rollout\.max_prompt_tokens=20 and max_response_tokens=109 are above the student's context of 128",
    ):
        refuse(world, tmp_path / "run", "rollout.max_response_tokens=109")


def test_evaluation_without_answers_is_refused_before_training(world: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^evaluation\.files: row 0 of .*prompts\.jsonl has no answer"):
        refuse(world, tmp_path / "run", f'evaluation.files=["{world[0] / "prompts.jsonl"}"]')


def test_no_queue_at_all(world: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPD_REDIS_URL", raising=False)
    with pytest.raises(ConfigError, match=r"^teacher\.url: is empty and OPD_REDIS_URL is not set"):
        refuse(world, tmp_path / "run", "teacher.url=''")


def test_the_queue_may_come_from_the_environment(
    world: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_REDIS_URL", world[1])
    with pytest.raises(TeacherUnavailableError, match=r"^teacher pool teacher: no replica within 0 s"):
        refuse(world, tmp_path / "run", "teacher.url=''")
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_folder_that_holds_a_run(world: tuple[Path, str], tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    log.create({})
    log.write_step(1, {}, {})
    with pytest.raises(ConfigError, match=rf"^run_dir={tmp_path}/run: holds a run already; use --resume"):
        refuse(world, tmp_path / "run")


def save(run_dir: Path, **changes: Any) -> None:
    model = tiny_model(1)
    state = {"step": 2, "seed": 0, "prompts_digest": "other", "config": {}} | changes
    tensors = StudentOptimizer(model, load_settings(TrainSettings, None, ["student.model=x", 'data.files=["x"]']).optim)
    CheckpointStore(run_dir / "checkpoints", keep_last=1).save(
        model, tiny_tokenizer(), tensors.state_tensors(), TrainerState(**state)
    )


def test_a_checkpoint_that_cannot_be_read(world: tuple[Path, str], tmp_path: Path) -> None:
    save(tmp_path / "run")
    (tmp_path / "run/checkpoints/step-000002/trainer/state.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"state\.json: cannot be read"):
        refuse(world, tmp_path / "run", resume=True)


def test_alarms_that_are_to_shorten_what_is_not_there(world: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^alarms\.shorten=overlap_collapse: this run has no supervised horizon"):
        refuse(world, tmp_path / "run", 'alarms.shorten=["overlap_collapse"]')
    assert not (tmp_path / "run").exists()


def test_a_status_port_that_is_taken(world: tuple[Path, str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^http\.port={port}: 127\.0\.0\.1 cannot listen there"):
            refuse(world, tmp_path / "run", f"http.port={port}")


@pytest.mark.parametrize("change", [{}, {"seed": 1}], ids=["prompts", "seed"])
def test_a_checkpoint_of_other_prompts_or_another_seed(
    world: tuple[Path, str], tmp_path: Path, change: dict[str, int]
) -> None:
    save(tmp_path / "run", **change)
    with pytest.raises(CheckpointError, match=r"step-000002: was made with other prompts or another seed"):
        refuse(world, tmp_path / "run", resume=True)


def test_an_objective_of_outcomes_wants_an_answer_to_every_prompt(world: tuple[Path, str], tmp_path: Path) -> None:
    for overrides in (["objective.kind=grpo", 'teacher.url=""'], ["objective.outcome.weight=0.5"]):
        with pytest.raises(ConfigError, match=r"^data\.files: prompt 0 of tiny has no answer"):
            refuse(world, tmp_path / "run", *overrides)


def test_grpo_runs_from_end_to_end_without_a_teacher_or_a_queue(
    world: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPD_REDIS_URL", raising=False)
    rows = [{"prompt": f"w{i}", "reward_model": {"ground_truth": str(i)}} for i in range(8)]
    (tmp_path / "answered.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    overrides = [
        f"student.model={world[0] / 'student'}", f'data.files=["{tmp_path}/answered.jsonl"]', "data.template=dapo",
        f"run_dir={tmp_path / 'run'}", "rollout.prompts_per_step=2", "rollout.rollouts_per_prompt=3",
        "rollout.max_prompt_tokens=80", "rollout.max_response_tokens=16", "objective.kind=grpo", "steps=2",
        "objective.entropy_bonus=0.01", "student.device=cpu", "http.enabled=false",
    ]  # fmt: skip
    run = assemble(load_settings(TrainSettings, None, overrides), StopSignal(), resume=False)
    try:
        run.train()
    finally:
        run.close()
    steps = read_steps(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2]
    # A random student answers nothing, so that only the entropy bonus has a gradient.
    assert all(step["outcome/reward"] == 0 and step["outcome/zero_variance_fraction"] == 1 for step in steps)
    assert all(step["optim/grad_norm"] > 0 and step["loss/outcome"] == 0 for step in steps)
    assert (tmp_path / "run/checkpoints/step-000002/model.safetensors").is_file()
    # Nothing is sent to anybody, so nothing is said of it.
    assert not [name for name in steps[0] if name.startswith("queue/")]
    summary = json.loads((tmp_path / "run/train_summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 2 and not [name for name in summary if name.startswith("rollouts_")]


def test_resuming_without_a_checkpoint_forgets_what_the_dead_attempt_left(
    world: tuple[Path, str], tmp_path: Path
) -> None:
    folder, run_dir = world[0], tmp_path / "run"
    overrides = [
        f"student.model={folder / 'student'}", f'data.files=["{folder / "prompts.jsonl"}"]', f"run_dir={run_dir}",
        "rollout.prompts_per_step=2", "rollout.rollouts_per_prompt=2", "rollout.max_prompt_tokens=20",
        "rollout.max_response_tokens=16", "objective.score_top_k=6", "objective.horizon.start=4", "teacher.kind=self",
        "student.device=cpu", "http.enabled=false", "steps=2",
    ]  # fmt: skip
    log = RunLog(run_dir)
    log.create({})
    for step in (1, 2, 3):
        log.write_step(step, {"queue/rollouts_sent": 4.0, "horizon/length": 15.0}, {})
    (run_dir / PROBE_FILE).write_bytes(b"of the dead attempt")
    run = assemble(load_settings(TrainSettings, None, overrides), StopSignal(), resume=True)
    try:
        run.train()
        summary = run.summary("finished")
    finally:
        run.close()
    assert [(step["step"], step["horizon/length"]) for step in read_steps(run_dir)] == [(1, 4), (2, 4)]
    assert summary["rollouts_sent"] == 8
    assert not (run_dir / PROBE_FILE).exists(), "four rollouts a step make no probe"
    events = [json.loads(line) for line in (run_dir / EVENTS_FILE).read_text(encoding="utf-8").splitlines()]
    assert (events[0]["event"], events[0]["step"]) == ("resume", 0)


def test_the_student_computes_with_as_many_threads_as_it_is_told(world: tuple[Path, str], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        with pytest.raises(TeacherUnavailableError):
            refuse(world, tmp_path / "run", f"student.threads={before + 1}")
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("field", ["student.threads", "rollout.threads"])
def test_no_threads_at_all_are_refused(world: tuple[Path, str], tmp_path: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        refuse(world, tmp_path / "run", f"{field}=0")
