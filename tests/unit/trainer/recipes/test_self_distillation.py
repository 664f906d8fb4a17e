"""Teachers held by the trainer: the scores of a pool, no divergence from oneself, and an average that is one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opd.errors import CheckpointError, ConfigError, InvalidRequestError, NonFiniteError, UnsupportedError
from opd.ops import score_rows
from opd.settings import load_settings
from opd.types import ScoreRequest
from services.trainer.assembly import assemble
from services.trainer.config import TrainSettings
from services.trainer.models import load_model
from services.trainer.recipes.self_distillation.held import held_teacher
from services.trainer.recipes.self_distillation.moving_average import FollowedWeights, MovingAverageTeacher
from services.trainer.recipes.self_distillation.teacher import LocalTeacher
from services.trainer.run_log import read_steps
from services.trainer.stop import StopSignal
from tests.unit.trainer.tiny_training import exact_scores, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `student/`, `other/` and `prompts.jsonl` whose rows have answers and solutions."""
    folder = tmp_path_factory.mktemp("self")
    for seed, name in ((1, "student"), (2, "other")):
        tiny_model(seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    rows = [
        {"prompt": f"w{2 + i} w9", "reward_model": {"ground_truth": f"w{3 + i}"}, "solution": f"w{4 + i} w8"}
        for i in range(6)
    ]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder


def settings_of(world: Path, run_dir: Path, *overrides: str) -> TrainSettings:
    return load_settings(
        TrainSettings,
        None,
        [
            f"student.model={world / 'student'}",
            f'data.files=["{world / "prompts.jsonl"}"]',
            f"run_dir={run_dir}",
            "student.device=cpu",
            "rollout.prompts_per_step=3",
            "rollout.rollouts_per_prompt=2",
            "rollout.max_prompt_tokens=20",
            "rollout.max_response_tokens=10",
            "objective.score_top_k=6",
            "http.enabled=false",
            "optim.lr=3e-3",
            "steps=2",
            *overrides,
        ],
    )


def trained(settings: TrainSettings, *, resume: bool = False) -> list[dict[str, Any]]:
    """Runs to the end; the records of all steps."""
    run = assemble(settings, StopSignal(), resume=resume)
    try:
        run.train()
    finally:
        run.close()
    return read_steps(settings.run_dir)


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def request(**changes: Any) -> ScoreRequest:
    fields: dict[str, Any] = {
        "rollout_id": "run.0.0",
        "tenant": "default",
        "teacher": "pool",
        "prompt_token_ids": np.array([5, 9, 2], np.int32),
        "response_token_ids": np.array([7, 3, 4, 1], np.int32),
        "candidate_token_ids": np.array([[7, 3], [3, 8], [4, 9], [1, 2]], np.int32),
        "score_top_k": 4,
        "wants_entropy": True,
        "teacher_temperature": 0.7,
    }
    return ScoreRequest(**(fields | changes))


def test_it_answers_as_a_pool_does(world: Path) -> None:
    teacher = LocalTeacher(load_model(str(world / "other"), device="cpu"), pool="pool")
    reply = teacher.submit(request()).result(0)
    expected = exact_scores(tiny_model(2), request())
    assert reply.teacher_fingerprint == teacher.info().fingerprint
    assert np.array_equal(reply.scores.topk_token_ids, expected.topk_token_ids)
    for name in ("sampled_logprobs", "candidate_logprobs", "topk_logprobs", "entropy"):
        found = getattr(reply.scores, name)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, getattr(expected, name), atol=2e-5)


def test_rows_that_are_not_scored_are_nan(world: Path) -> None:
    teacher = LocalTeacher(load_model(str(world / "other"), device="cpu"), pool="pool")
    whole = teacher.submit(request()).result(0).scores
    rows = np.array([False, True, False, True])
    part = teacher.submit(request(scored_rows=rows, wants_entropy=False)).result(0).scores
    assert part.entropy is None
    assert whole.candidate_logprobs is not None and part.candidate_logprobs is not None
    # Passes of other shapes may round otherwise: equal within the contract's bound, not to the bit.
    np.testing.assert_allclose(part.candidate_logprobs[rows], whole.candidate_logprobs[rows], rtol=0, atol=1e-5)
    assert np.isnan(part.candidate_logprobs[~rows]).all()
    assert part.topk_token_ids is not None and (part.topk_token_ids[~rows] == -1).all()


@pytest.mark.parametrize("kind", [["self"], ["self", "teacher.ema_decay=0.9"], ["folder", "teacher.model=other"]])
def test_every_kind_keeps_to_the_students_row_chunk(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: list[str]
) -> None:
    """Of the whole vocabulary no more logits exist at a time: the head is applied to that many rows."""
    monkeypatch.chdir(world)
    settings = settings_of(world, tmp_path / "run", "student.row_chunk=3", *[f"teacher.kind={kind[0]}", *kind[1:]])
    teacher = held_teacher(settings, load_model(str(world / "student"), device="cpu"), None)
    assert teacher is not None
    rows: list[int] = []

    def counted(*args: Any, row_chunk: int, **rest: Any) -> Any:
        rows.append(row_chunk)
        return score_rows(*args, row_chunk=row_chunk, **rest)

    monkeypatch.setattr("services.trainer.recipes.self_distillation.teacher.score_rows", counted)
    assert teacher.submit(request(teacher=settings.teacher.pool)).result(0).scores.entropy is not None
    assert rows == [3]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"wants_hidden_states": True}, UnsupportedError, "no hidden states"),
        ({"response_token_ids": np.zeros(126, np.int32)}, InvalidRequestError, "129 tokens are above .* of 128"),
    ],
)
def test_what_it_cannot_score_is_an_error_of_the_future(
    world: Path, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    teacher = LocalTeacher(load_model(str(world / "other"), device="cpu"), pool="pool")
    with pytest.raises(kind, match=message):
        teacher.submit(request(candidate_token_ids=None, **changes)).result(0)


def test_broken_weights_are_never_a_score(world: Path) -> None:
    loaded = load_model(str(world / "other"), device="cpu")
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"run\.0\.0: the teacher's logits are NaN"):
        LocalTeacher(loaded, pool="pool").submit(request()).result(0)


def test_a_frozen_self_has_no_divergence_at_the_first_step_and_is_kept(world: Path, tmp_path: Path) -> None:
    records = trained(settings_of(world, tmp_path / "run", "teacher.kind=self", "rollout.temperature=1.0"))
    assert abs(records[0]["loss/reverse_kl"]) < 1e-9
    assert records[0]["distill/overlap_ratio"] == 1.0
    assert records[0]["optim/grad_norm"] < 1e-4
    assert len(events(tmp_path / "run", "teachers")) == 1


def test_privileged_context_gives_the_frozen_self_something_to_teach(world: Path, tmp_path: Path) -> None:
    context = "data.teacher_context=' {answer} {context}'"
    overrides = ("teacher.kind=self", context, "data.teacher_context_column=solution")
    records = trained(settings_of(world, tmp_path / "run", *overrides))
    assert records[0]["loss/reverse_kl"] > 1e-3


def test_a_folder_teaches_as_its_model_does(world: Path, tmp_path: Path) -> None:
    held = trained(settings_of(world, tmp_path / "held", "teacher.kind=folder", f"teacher.model={world / 'other'}"))
    itself = trained(settings_of(world, tmp_path / "self", "teacher.kind=folder", f"teacher.model={world / 'student'}"))
    assert held[0]["loss/reverse_kl"] > 1e-2
    assert abs(itself[0]["loss/reverse_kl"]) < 1e-9


def test_the_average_is_the_recursion_in_float64(world: Path) -> None:
    initial, student = load_model(str(world / "student"), device="cpu"), tiny_model(2)
    expected = {name: value.detach().double() for name, value in initial.model.named_parameters()}
    teacher = MovingAverageTeacher(initial, student, pool="pool", decay=0.9)
    first = teacher.info().fingerprint
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 31):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        teacher.follow(step)
        teacher.follow(step)
        current = dict(student.named_parameters())
        expected = {name: 0.9 * value + 0.1 * current[name].detach().double() for name, value in expected.items()}
    for name, value in teacher.state_tensors().items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-6)
    assert teacher.info().fingerprint not in ("", first)


def test_it_moves_once_for_each_published_step(world: Path) -> None:
    published: list[int] = []

    class Inner:
        def publish(self, policy_version: int) -> None:
            published.append(policy_version)

    teacher = MovingAverageTeacher(
        load_model(str(world / "student"), device="cpu"), tiny_model(2), pool="pool", decay=0.5, step=4
    )
    before = {name: value.clone() for name, value in teacher.state_tensors().items()}
    weights = FollowedWeights(Inner(), teacher)
    weights.publish(4)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_tensors().items())
    weights.publish(5)
    assert published == [4, 5]
    assert not all(torch.equal(value, before[name]) for name, value in teacher.state_tensors().items())
    assert teacher.info().fingerprint.endswith("+5")


def test_a_resumed_average_goes_on_as_if_nothing_had_happened(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = ("teacher.kind=self", "teacher.ema_decay=0.8", "data.teacher_context=' {answer}'", "data.num_epochs=9")
    whole = settings_of(world, tmp_path / "whole", *overrides, "steps=4")
    trained(whole)
    halves = settings_of(world, tmp_path / "halves", *overrides, "steps=2")
    trained(halves)
    resumed = trained(halves.model_copy(update={"steps": 4}), resume=True)
    assert [record["step"] for record in resumed] == [1, 2, 3, 4]
    for name in ("model", "trainer/moving_average"):
        files = [settings.run_dir / f"checkpoints/step-000004/{name}.safetensors" for settings in (whole, halves)]
        one, other = map(load_file, files)
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], atol=1e-6, rtol=1e-6)
    assert len(events(whole.run_dir, "teachers")) == 1, "an average that moves is the same teacher"
    assert "teacher changed" not in caplog.text


def test_a_checkpoint_without_the_average_or_with_anothers_is_refused(world: Path, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path / "run", "teacher.kind=self", "teacher.ema_decay=0.8", "data.num_epochs=9")
    trained(settings)
    folder = settings.run_dir / "checkpoints/step-000002"
    # Without digests, as a record of an earlier version is: else the folder would be passed over.
    record = json.loads((folder / "trainer/state.json").read_text(encoding="utf-8"))
    del record["sha256"], record["record_sha256"]
    (folder / "trainer/state.json").write_text(json.dumps(record), encoding="utf-8")
    average = folder / "trainer/moving_average.safetensors"
    shutil.copy(folder / "trainer/optimizer.safetensors", average)
    with pytest.raises(CheckpointError, match="moving-average teacher: the checkpoint's is of another model"):
        trained(settings, resume=True)
    average.unlink()
    with pytest.raises(CheckpointError, match=r"moving_average\.safetensors: cannot be read"):
        trained(settings, resume=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.kind=folder"], "teacher.kind=folder without teacher.model"),
        (["teacher.model=x"], "teacher.model=x with kind=pool: would be ignored"),
        (["teacher.kind=folder", "teacher.model=x", "teacher.ema_decay=0.9"], "teacher.ema_decay=0.9 with kind=folder"),
        (["teacher.kind=self", "objective.kind=full_vocabulary"], "hidden states come from a service"),
        (["teacher.kind=self", "teacher.url=redis://h"], r"^teacher\.url with teacher\.kind=self: would be ignored"),
        (
            ["teacher.kind=folder", "teacher.model=x", "teacher.url=redis://h"],
            r"^teacher\.url with teacher\.kind=folder",
        ),
        (["teacher.kind=self", "teachers.a.pool=a", "data.teacher_column=who"], r"with \[teachers\]: several teachers"),
    ],
)
def test_contradictions_are_refused(world: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of(world, tmp_path / "run", *overrides)


@pytest.fixture
def refused(world: Path, tmp_path: Path) -> Callable[..., None]:
    def refuse(message: str, *overrides: str) -> None:
        with pytest.raises(ConfigError, match=message):
            assemble(settings_of(world, tmp_path / "run", *overrides), StopSignal(), resume=False)

    return refuse


def test_a_context_too_long_for_the_teacher_is_refused_at_the_start(world: Path, tmp_path: Path) -> None:
    context = f"data.teacher_context='{' w3' * 116} {{answer}}'"
    with pytest.raises(
        UnsupportedError, match=r"^prompt 0 of prompts: .* it is 130 tokens, teacher teacher takes at most 128; shorten"
    ):
        assemble(settings_of(world, tmp_path / "run", "teacher.kind=self", context), StopSignal(), resume=False)


def test_a_context_that_a_row_cannot_fill_names_the_row(refused: Callable[..., None]) -> None:
    refused("prompt 0 of prompts: .* wants its context", "teacher.kind=self", "data.teacher_context={context}")
    refused(
        r"row 0: column hint is missing",
        "teacher.kind=self",
        "data.teacher_context={context}",
        "data.teacher_context_column=hint",
    )
