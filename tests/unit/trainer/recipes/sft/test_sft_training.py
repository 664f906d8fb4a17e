"""Fine-tuning: the schedule, exact means under any split, and a run that was ended goes on bit by bit."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd.errors import CheckpointError, ConfigError
from opd.vocabulary import describe_vocabulary
from services.trainer.models import LoadedModel, load_model
from services.trainer.recipes.sft.config import SftSettings
from services.trainer.recipes.sft.curve import draw_loss_curve
from services.trainer.recipes.sft.packing import SftExample
from services.trainer.recipes.sft.schedule import cosine_factor
from services.trainer.recipes.sft.training import LOSS, VALIDATION_LOSS, SftRun, plan_steps, starting_point
from services.trainer.run_log import read_steps
from tests.unit.trainer.tiny_training import EOS, tiny_model, tiny_tokenizer

SETTINGS = SftSettings.model_validate(
    {
        "rows_per_batch": 2,
        "sequence_tokens": 24,
        "validation_share": 0.1,
        "checkpoint_every_steps": 2,
        "optim": {"lr": 1e-2},
    }
)


class Ended(Exception):
    """The process goes away in mid-run."""


def examples(count: int = 60) -> list[SftExample]:
    """Responses that count up from the prompt: easy to learn."""
    generator = np.random.default_rng(0)
    starts = generator.integers(3, 15, size=count).tolist()
    return [
        SftExample(name=str(index), prompt_token_ids=(start, 2), response_token_ids=(start + 1, start + 2, EOS))
        for index, start in enumerate(starts)
    ]


def loaded(folder: Path | None = None) -> LoadedModel:
    if folder is not None:
        return load_model(str(folder), device="cpu")
    tokenizer = tiny_tokenizer()
    return LoadedModel(
        name="tiny",
        model=tiny_model(5),
        tokenizer=tokenizer,
        eos_token_ids=(EOS,),
        vocabulary=describe_vocabulary(tokenizer),
        fingerprint="f",
    )


def train(folder: Path, settings: SftSettings = SETTINGS, *, end_at: int | None = None) -> LoadedModel:
    plan = plan_steps(examples(), settings, student="s", max_tokens=24, seed=1)
    checkpoint = starting_point(folder, plan)
    model = loaded(checkpoint.folder if checkpoint else None)

    def on_step(step: int, metrics: dict[str, float]) -> None:
        if step == end_at:
            raise Ended

    SftRun(model, plan, settings, folder=folder, seed=1).train(checkpoint, on_step)
    return model


def weights(model: LoadedModel) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in model.model.state_dict().items()}


def test_the_schedule_warms_up_and_falls_along_a_cosine() -> None:
    factors = [cosine_factor(step, 100, 0.05) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0
    assert factors[5 + 19] == pytest.approx(0.5 * (1 + math.cos(math.pi * 19 / 95)))
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[5:]))
    assert 0 < factors[-1] < 1e-3
    assert cosine_factor(0, 10, 0.0) == 1.0


def test_it_learns_and_says_the_loss_before_and_after(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"num_epochs": 8, "checkpoint_every_steps": 1000})
    train(tmp_path, settings)
    summary = json.loads((tmp_path / "train_summary.json").read_text(encoding="utf-8"))
    assert summary["validation_examples"] == 6
    assert summary["validation_loss_after"] < 0.2 * summary["validation_loss_before"]
    records = read_steps(tmp_path)
    assert [record["step"] for record in records] == list(range(summary["steps"] + 1))
    assert VALIDATION_LOSS in records[0] and LOSS not in records[0]
    assert summary["response_tokens"] == 8 * 54 * 3
    rates = [record["optim/lr"] for record in records[1:]]
    assert rates == pytest.approx([1e-2 * cosine_factor(step, len(rates), 0.05) for step in range(len(rates))])
    draw_loss_curve(records, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_ended_goes_on_bit_by_bit(tmp_path: Path) -> None:
    whole = weights(train(tmp_path / "whole"))
    with pytest.raises(Ended):
        train(tmp_path / "parts", end_at=3)
    resumed = weights(train(tmp_path / "parts"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    losses = [[record.get(LOSS) for record in read_steps(tmp_path / folder)] for folder in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) > 4


def test_a_step_does_not_depend_on_its_micro_batches(tmp_path: Path) -> None:
    """The mean is over the tokens of the step, however its rows are split."""
    plan = plan_steps(examples(), SETTINGS, student="s", max_tokens=24, seed=1)
    gradients = []
    for limit in (24, 1000):
        model = loaded()
        settings = SETTINGS.model_copy(update={"max_micro_batch_tokens": limit})
        run = SftRun(model, plan, settings, folder=tmp_path / str(limit), seed=1)
        run._train_step(0)
        gradients.append(torch.cat([value.grad.flatten() for value in model.model.parameters()]).double())
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert float(difference) < 1e-5


def test_the_first_loss_is_the_mean_cross_entropy_of_response_tokens(tmp_path: Path) -> None:
    """Against the library's own cross entropy, one example at a time in float64."""
    plan = plan_steps(examples(), SETTINGS, student="s", max_tokens=24, seed=1)
    model = tiny_model(5).double()
    total, count = 0.0, 0
    for row in plan.steps[0]:
        for example in row:
            ids = torch.tensor(example.prompt_token_ids + example.response_token_ids)
            labels = ids.clone()
            labels[: len(example.prompt_token_ids)] = -100
            with torch.no_grad():
                mean = model(input_ids=ids[None], labels=labels[None]).loss.item()
            total += mean * len(example.response_token_ids)
            count += len(example.response_token_ids)
    with pytest.raises(Ended):
        train(tmp_path, end_at=1)
    assert read_steps(tmp_path)[1][LOSS] == pytest.approx(total / count, abs=1e-5)


def test_another_plan_does_not_go_on_from_this_one(tmp_path: Path) -> None:
    with pytest.raises(Ended):
        train(tmp_path, end_at=3)
    for student, count in (("s", 50), ("another", 60)):
        other = plan_steps(examples(count), SETTINGS, student=student, max_tokens=24, seed=1)
        with pytest.raises(CheckpointError, match="another student, examples or settings"):
            starting_point(tmp_path, other)
    # How the work is cut changes nothing that is learnt.
    same = plan_steps(examples(), SETTINGS.model_copy(update={"row_chunk": 7}), student="s", max_tokens=24, seed=1)
    assert starting_point(tmp_path, same) is not None


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave none to train on"):
        plan_steps(examples(1), SETTINGS, student="s", max_tokens=24, seed=0)
