"""Training: the schedule, interruptions that leave no trace, checkpoints, and what expert iteration keeps."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from testbed import expert
from testbed.architecture import Size, create_model
from testbed.batches import Batch, Position, demonstration_batches
from testbed.demonstrations import Recipe, demonstrations
from testbed.expert import Kept, Rounds
from testbed.measuring import Graded
from testbed.problems import LEVELS
from testbed.sampling import Response
from testbed.tokenizer import train_tokenizer
from testbed.training import Progress, Schedule, mean_loss, train

TINY = Size(hidden=32, layers=1, heads=2, key_value_heads=1, intermediate=48, dtype=torch.float32, head_dim=16)
RECIPE = Recipe(long_share=0.0)
SCHEDULE = Schedule(updates=8, learning_rate=3e-3, warmup=2, max_tokens=512, checkpoint_every=3)


class Interrupted(Exception):
    """Stands for a process that was ended from outside."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(demo.prompt + demo.response for demo in islice(demonstrations(0, RECIPE), 50))


def stream(tokenizer: PreTrainedTokenizerFast, start: Position) -> Iterator[Batch]:
    return demonstration_batches(tokenizer, RECIPE, "test", 512, start)


def run(
    tokenizer: PreTrainedTokenizerFast, folder: Path, schedule: Schedule, stop_at: int = 0
) -> tuple[Qwen3ForCausalLM, Progress]:
    model = create_model(TINY, tokenizer, 0)

    def report(progress: Progress) -> None:
        if progress.update == stop_at:
            raise Interrupted

    held_out = list(islice(stream(tokenizer, Position(chunk=9, offset=0)), 1))
    return model, train(model, schedule, partial(stream, tokenizer), folder, held_out, report)


def test_the_rate_warms_up_and_falls_to_its_final_share() -> None:
    schedule = Schedule(updates=100, learning_rate=1.0, warmup=10, final_share=0.1)
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(9) == schedule.rate(10) == pytest.approx(1.0)
    assert schedule.rate(55) == pytest.approx(0.55)
    assert schedule.rate(100) == pytest.approx(0.1)


@pytest.mark.parametrize("stop_at", [2, 5])
def test_an_interruption_leaves_no_trace(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, stop_at: int) -> None:
    whole, whole_progress = run(tokenizer, tmp_path / "whole", SCHEDULE)
    with pytest.raises(Interrupted):
        run(tokenizer, tmp_path / "cut", SCHEDULE, stop_at=stop_at)
    resumed, resumed_progress = run(tokenizer, tmp_path / "cut", SCHEDULE)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert resumed_progress.losses == whole_progress.losses
    assert resumed_progress.held_out_losses == whole_progress.held_out_losses
    assert resumed_progress.seen_tokens == whole_progress.seen_tokens


def test_checkpoints_are_safetensors_and_json(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    run(tokenizer, tmp_path, SCHEDULE)
    assert {path.name for path in tmp_path.iterdir()} == {"8-tensors.safetensors", "state.json"}


def test_training_lowers_the_loss(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    schedule = replace(SCHEDULE, updates=30, checkpoint_every=30)
    held_out = list(islice(stream(tokenizer, Position(chunk=9, offset=0)), 2))
    before = mean_loss(create_model(TINY, tokenizer, 0), held_out)
    model, _ = run(tokenizer, tmp_path, schedule)
    assert mean_loss(model, held_out) < before - 0.3


def test_kept_responses_read_back(tmp_path: Path) -> None:
    kept = [Kept(level="1", prompt="a\nb", response="\u00e9"), Kept(level="2", prompt="c", response="d")]
    for responses in (kept, []):
        expert.write_kept(tmp_path / "kept.jsonl", responses)
        assert expert.read_kept(tmp_path / "kept.jsonl") == responses


def test_fresh_items_are_train_problems_of_their_level() -> None:
    items = expert.draw_items(Random(0), "3", 20)
    assert {item.level for item in items} == {"3"}
    assert items == expert.draw_items(Random(0), "3", 20)


def test_collect_keeps_right_answers_only_and_balances_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_grade(
        model: object, tokenizer: object, items: list[object], templates: list[str], *rest: object
    ) -> list[object]:
        response = Response(text="right", num_tokens=1, truncated=False, entropies=(0.0,), num_live=(1,))
        wrong = replace(response, text="wrong")
        return [
            Graded(
                item=item, template=templates[0], response=wrong if place % 4 else response, is_correct=not place % 4
            )
            for place, item in enumerate(items)
        ]

    monkeypatch.setattr(expert, "grade_samples", fake_grade)
    rounds = Rounds(samples=tuple((level, 64) for level in LEVELS), kept_per_level=10)
    kept, accuracy = expert.collect(None, None, rounds, "seed")
    assert accuracy == dict.fromkeys(LEVELS, 0.25)
    assert [one.level for one in kept] == [level for level in LEVELS for _ in range(10)]
    assert {one.response for one in kept} == {"right"}
