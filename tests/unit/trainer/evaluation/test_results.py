"""The table of an evaluation: a table a model, readable in 80 columns, nothing said twice."""

import io
from dataclasses import replace

from rich.console import Console

from services.trainer.evaluation.results import EvaluationResult, GradedSample, Summary, results_tables, summarize

SAMPLE = GradedSample(
    problem=0, sample=0, is_correct=True, extracted="1", num_tokens=70, is_truncated=False, response="1"
)


def result(model: str, **parts: dict[str, list[bool]]) -> EvaluationResult:
    def summary(correct: list[bool]) -> Summary:
        samples = [replace(SAMPLE, sample=place, is_correct=is_correct) for place, is_correct in enumerate(correct)]
        return summarize([samples])

    groups = {kind: {name: summary(found) for name, found in named.items()} for kind, named in parts.items()}
    return EvaluationResult(
        model=model, fingerprint="f", data="heldout", sampling={}, total=summary([True, False]),
        by_source=groups.get("by_source", {}), by_level=groups.get("by_level", {}), accuracy_by_problem=(0.5,),
    )  # fmt: skip


def printed(*results: EvaluationResult) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    for table in results_tables(results):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


LEVELS = {"1": [True, True], "2": [False, True]}


def test_one_table_a_model_in_80_columns() -> None:
    first = result("step-000024", by_source={"math/algebra": [True, True], "math/geometry": [False, True]})
    lines = printed(first, replace(first, data="other"), result("teacher"))
    assert [line.strip() for line in lines].count("step-000024") == 1
    assert max(len(line) for line in lines) <= 80
    assert "50 50-50" in "\n".join(lines)
    text = "\n".join(lines)
    for word in ("avg@2", "pass@2", "teacher", "heldout", "other", "algebra", "geometry", "100.0%"):
        assert word in text
    assert "…" not in text


def test_sixteen_samples_with_the_widest_intervals_fit_in_80_columns() -> None:
    wide = result("m", by_source={"math/algebra": [True] * 16, "math/geometry": [False] * 16})
    total = summarize(
        [
            [replace(SAMPLE, problem=problem, sample=place, is_correct=problem > 0) for place in range(16)]
            for problem in range(3)
        ]
    )
    lines = printed(replace(wide, total=total))
    assert max(len(line) for line in lines) <= 80
    assert "…" not in "\n".join(lines)
    assert "67 0-100" in "\n".join(lines) and "100 100-100" in "\n".join(lines)


def test_sources_that_are_levels_are_said_once() -> None:
    same = "\n".join(
        printed(result("m", by_source={"t/level1": [True, True], "t/level2": [False, True]}, by_level=LEVELS))
    )
    assert "level1" in same and "level 1" not in same
    other = "\n".join(printed(result("m", by_source={"a": [True, True], "b": [True, True]}, by_level=LEVELS)))
    assert "level 1" in other
