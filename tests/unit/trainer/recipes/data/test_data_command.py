"""`opd data` from files to files: rows, card, determinism; and the counts of the paper's real sets."""

import io
import json
import re
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opd.errors import ConfigError
from opd.settings import load_settings
from services.trainer.prompts import load_problems
from services.trainer.prompts.problems import load_rows
from services.trainer.recipes.data.command import run_data_recipe
from services.trainer.recipes.data.config import DataRecipeSettings
from services.trainer.recipes.data.writing import harmonize, write_rows
from services.trainer.templates import TEMPLATES

SHARED_DATA = Path(__file__).parents[6] / "shared" / "data"
NEAR = ("semantic.backend=tfidf", "semantic.within=true")
QUESTIONS = {
    "a": ["What is 17 + 25?", "How many primes lie below 100?", "What is 17 + 25?", "Name the tallest tower in Rome."],
    "b": ["How many primes lie below 100 ?", "Find the area of a circle of radius 3.", "Which is 5 - 2?"],
}


def write_source(folder: Path, name: str, template: str = "dapo") -> Path:
    path = folder / f"{name}.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": TEMPLATES[template].render(question)}],
            "reward_model": {"ground_truth": "1", "style": "rule"},
            "data_source": f"source-{name}",
            # Published sets disagree on the type of this one.
            "extra_info": {"index": index if name == "a" else f"id-{index}"},
        }
        for index, question in enumerate(QUESTIONS[name])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(folder: Path, *overrides: str, output: str = "out.parquet") -> dict[str, Any]:
    files = {name: write_source(folder, name) for name in QUESTIONS}
    settings = load_settings(
        DataRecipeSettings,
        None,
        [
            *(f"sources.{name}.files=['{file}']" for name, file in files.items()),
            f"output={folder / output}",
            *overrides,
        ],
    )
    return run_data_recipe(settings, Console(file=io.StringIO()))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_the_output_is_a_prompt_set_in_the_new_template(tmp_path: Path, suffix: str) -> None:
    card = run(tmp_path, "template=boxed", output=f"out.{suffix}")
    problems = load_problems(str(tmp_path / f"out.{suffix}"))
    expected = [*QUESTIONS["a"][:2], QUESTIONS["a"][3], *QUESTIONS["b"]]
    assert [problem.question for problem in problems] == expected
    assert {problem.template for problem in problems} == {"boxed"}
    assert {problem.source for problem in problems} == {"source-a", "source-b"}
    assert all(problem.answer == "1" for problem in problems)
    assert [(stage["stage"], stage["in"], stage["out"]) for stage in card["stages"]] == [
        ("read", 7, 7),
        ("exact", 7, 6),
    ]
    assert card["stages"][1]["dropped"] == {"exact_within": 1}
    assert card["output"]["rows_by_source"] == {"a": 3, "b": 3}


def test_near_duplicates_are_dropped_with_their_pairs_on_the_card(tmp_path: Path) -> None:
    card = run(tmp_path, "semantic.enabled=true", *NEAR, "semantic.threshold=0.9")
    assert card["stages"][-1]["dropped"] == {"semantic_within": 1}
    assert card["embeddings"]["backend"] == "tfidf"
    (example,) = card["examples"]["semantic_within"]
    assert (example["source"], example["partner"]["source"]) == ("b", "a")
    assert example["similarity"] == pytest.approx(1.0, abs=1e-3)
    markdown = (tmp_path / "out.card.md").read_text(encoding="utf-8")
    assert "cosine >= 0.9" in markdown and QUESTIONS["b"][0] in markdown and QUESTIONS["a"][1] in markdown
    dropped = [json.loads(line) for line in (tmp_path / "out.dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["reason"] for record in dropped] == ["exact_within", "semantic_within"]


def test_another_set_is_kept_out(tmp_path: Path) -> None:
    against = write_source(tmp_path, "b", template="boxed").rename(tmp_path / "other.jsonl")
    card = run(tmp_path, f"against.files=['{against}']")
    assert card["stages"][-1]["dropped"] == {"exact_against": 3, "exact_within": 1}
    assert card["against_rows"] == 3


def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    options = ("mix.enabled=true", "sources.b.weight=0.5", "seed=3", "semantic.enabled=true", *NEAR)
    outputs = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        run(folder, *options)
        outputs.append([(folder / file).read_bytes() for file in ("out.parquet", "out.dropped.jsonl")])
    assert outputs[0] == outputs[1]


def test_an_output_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ConfigError, match="exists; remove it or give another name"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["exact.enabled=false", "against.files=['x.jsonl']"], "against.files=['x.jsonl'] does nothing"),
        (["sources.b.weight=1.0"], "sources.b.weight=1.0 does nothing; set mix.enabled=true"),
        (["length.max_prompt_tokens=1024"], "length.max_prompt_tokens=1024 does nothing; give length.tokenizer"),
        (["semantic.backend=tfidf", "semantic.model=x"], "semantic.model=x does nothing with semantic.backend=tfidf"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        run(tmp_path, *overrides)


def test_a_stage_that_leaves_nothing_says_so(tmp_path: Path) -> None:
    against = write_source(tmp_path, "a").rename(tmp_path / "other.jsonl")
    with pytest.raises(ConfigError, match="exact: no row is left of 4"):
        run(tmp_path, f"against.files=['{against}']", "sources.b.files=[]")


def test_columns_of_several_sources_become_one_set() -> None:
    rows = [{"x": 1, "info": {"index": 3}}, {"y": "s", "info": {"index": "id", "level": 2}}, {"x": 2.5}]
    assert harmonize(rows) == [
        {"x": 1, "info": {"index": "3", "level": None}, "y": None},
        {"x": None, "info": {"index": "id", "level": 2}, "y": "s"},
        {"x": 2.5, "info": None, "y": None},
    ]


@pytest.mark.parametrize("value", [datetime(2026, 1, 2, tzinfo=UTC), Decimal("0.5"), b"x"])
def test_a_column_that_json_cannot_hold_is_for_parquet_alone(tmp_path: Path, value: object) -> None:
    rows = [{"prompt": TEMPLATES["dapo"].render("What is 2 + 3?"), "extra_info": {"found": value}}]
    source = tmp_path / "s.parquet"
    write_rows(source, rows)
    given = [f"sources.s.files=['{source}']"]
    settings = load_settings(DataRecipeSettings, None, [*given, f"output={tmp_path / 'out.jsonl'}"])
    with pytest.raises(ConfigError, match=r"output=.*column 'extra_info' does not fit JSON lines .*; write \.parquet"):
        run_data_recipe(settings, Console(file=io.StringIO()))
    assert list(tmp_path.iterdir()) == [source]
    with pytest.raises(ConfigError, match=r"out\.jsonl: column 'extra_info' .*; write \.parquet"):
        write_rows(tmp_path / "out.jsonl", rows)
    settings = load_settings(DataRecipeSettings, None, [*given, f"output={tmp_path / 'out.parquet'}"])
    run_data_recipe(settings, Console(file=io.StringIO()))
    assert load_rows(str(tmp_path / "out.parquet"))[0]["extra_info"] == {"found": value}


@pytest.mark.shared_data
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "num_kept"), [("dapo-math-17k", 17398), ("DeepMath_deduped", 14085)])
def test_real_sets_have_the_known_number_of_distinct_questions(tmp_path: Path, name: str, num_kept: int) -> None:
    path = SHARED_DATA / f"{name}.parquet"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside the checkout")
    settings = load_settings(
        DataRecipeSettings, None, [f"sources.s.files=['{path}']", f"output={tmp_path / 'out.parquet'}"]
    )
    card = run_data_recipe(settings, Console(file=io.StringIO()))
    assert card["output"]["rows"] == num_kept
    assert card["output"]["rows_in_no_template"] == 0
    assert len(load_problems(str(tmp_path / "out.parquet"))) == num_kept
