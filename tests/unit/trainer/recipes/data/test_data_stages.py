"""Exact duplicates, length, and the shares of a mix."""

import pytest

from opd.errors import ConfigError
from opd.settings import load_settings
from services.trainer.prompts import PromptProblem
from services.trainer.recipes.data.candidates import Candidate, DropReason
from services.trainer.recipes.data.config import DataRecipeSettings, MixSettings, SourceSettings
from services.trainer.recipes.data.stages import draw_mix, drop_exact, drop_long, mix_counts
from tests.unit.trainer.tiny_training import tiny_tokenizer


def candidate(question: str, *, source: str = "a", index: int = 0) -> Candidate:
    problem = PromptProblem(
        index=index,
        messages=({"role": "user", "content": question},),
        question=question,
        template="",
        answer=None,
        source=source,
        level="",
    )
    return Candidate(source=source, file="f.jsonl", problem=problem, row={})


def sources(**weights: float) -> dict[str, SourceSettings]:
    return {name: SourceSettings(files=("f.jsonl",), weight=weight) for name, weight in weights.items()}


def test_the_first_of_equal_questions_stays_unless_the_other_set_has_it() -> None:
    rows = [candidate(text, index=index) for index, text in enumerate(["one", "two", "one", "three", "two"])]
    kept, drops = drop_exact(rows, [candidate("three", source="against")])
    assert [row.problem.index for row in kept] == [0, 1]
    found = [(drop.candidate.problem.index, drop.reason, drop.partner and drop.partner.problem.index) for drop in drops]
    assert found == [
        (2, DropReason.EXACT_WITHIN, 0),
        (3, DropReason.EXACT_AGAINST, 0),
        (4, DropReason.EXACT_WITHIN, 1),
    ]


def test_length_is_that_of_the_chat_template() -> None:
    """The tiny template puts one token after the message."""
    counts: list[int] = []
    rows = [candidate("w3 w4 w5"), candidate("w3 w4 w5 w6")]
    kept, drops = drop_long(rows, tiny_tokenizer(), 4, counts.append)
    assert kept == rows[:1]
    assert [(drop.reason, drop.num_tokens) for drop in drops] == [(DropReason.TOO_LONG, 5)]
    assert sum(counts) == 2


@pytest.mark.parametrize(
    ("available", "weights", "num_rows", "expected"),
    [
        ({"a": 10, "b": 10}, {"a": 1.0, "b": 1.0}, None, {"a": 10, "b": 10}),
        ({"a": 90, "b": 10}, {"a": 3.0, "b": 1.0}, None, {"a": 30, "b": 10}),
        ({"a": 3, "b": 99}, {"a": 1.0, "b": 2.0}, None, {"a": 3, "b": 6}),
        ({"a": 10, "b": 10, "c": 10}, {"a": 1.0, "b": 1.0, "c": 1.0}, 10, {"a": 4, "b": 3, "c": 3}),
        ({"a": 10, "b": 0}, {"a": 1.0, "b": 0.0}, None, {"a": 10}),
    ],
)
def test_a_mix_has_the_shares_of_its_weights(
    available: dict[str, int], weights: dict[str, float], num_rows: int | None, expected: dict[str, int]
) -> None:
    assert mix_counts(available, weights, num_rows) == expected


@pytest.mark.parametrize(
    ("available", "weights", "num_rows", "message"),
    [
        ({"a": 10, "b": 0}, {"a": 1.0, "b": 1.0}, None, r"sources\.b: has a weight and no row"),
        ({"a": 10, "b": 4}, {"a": 1.0, "b": 1.0}, 10, "source b has 4 rows for its share of 5"),
    ],
)
def test_a_mix_that_cannot_be_had_is_refused(
    available: dict[str, int], weights: dict[str, float], num_rows: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        mix_counts(available, weights, num_rows)


def test_a_mix_is_a_function_of_its_seed_and_repeats_no_row() -> None:
    rows = [candidate(f"q{index}", source="ab"[index % 2], index=index) for index in range(40)]

    def draw(seed: int) -> tuple[list[int], list[int]]:
        kept, drops = draw_mix(rows, sources(a=3.0, b=1.0), MixSettings(enabled=True, num_rows=16), seed)
        assert all(drop.reason is DropReason.NOT_DRAWN for drop in drops)
        return [row.problem.index for row in kept], [drop.candidate.problem.index for drop in drops]

    kept, left = draw(0)
    assert sorted(kept + left) == list(range(40))
    assert sum(index % 2 == 0 for index in kept) == 12
    assert draw(0) == (kept, left)
    assert draw(1)[0] != kept


def test_settings_that_contradict_each_other_name_field_and_way_out() -> None:
    source = 'sources.a.files=["x.jsonl"]'
    for overrides, message in (
        ([source, "output=x.csv"], "end it in .parquet or .jsonl"),
        (["sources.a.files=[]", "output=x.jsonl"], "give sources.NAME.files"),
        ([source, "output=x.jsonl", "mix.num_rows=3"], "set mix.enabled=true"),
        ([source, "output=x.jsonl", "mix.enabled=true", "sources.a.weight=0"], "every weight is 0"),
        ([source, "output=x.jsonl", "semantic.enabled=true"], "nothing is compared"),
        ([source, "output=x.jsonl", "semantic.thresh=0.5"], "did you mean threshold"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_settings(DataRecipeSettings, None, overrides)
