"""The split of the prompts, and the file of rollouts that survives any stop."""

import json
from pathlib import Path
from typing import Any

import pytest

from opd.errors import ConfigError
from services.trainer.prompts import load_problems
from services.trainer.recipes.cold_start.config import ColdStartDataSettings
from services.trainer.recipes.cold_start.prompt_split import split_prompts
from services.trainer.recipes.cold_start.rollout_file import RolloutFile, TeacherRollout
from services.trainer.recipes.data.writing import write_rows

IDENTITY = {"teacher": "t", "seed": 0}


def write_prompts(path: Path, questions: list[str]) -> Path:
    rows = [{"prompt": question, "data_source": "s", "teacher": "math"} for question in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def data(path: Path, **changes: Any) -> ColdStartDataSettings:
    return ColdStartDataSettings.model_validate({"files": (str(path),)} | changes)


def rollout(prompt: int) -> TeacherRollout:
    return TeacherRollout(prompt=prompt, sample=0, token_ids=[3, 1], text="ü\u2028", is_truncated=False)


def test_both_parts_together_are_all_distinct_questions(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "p.jsonl", [f"q{index % 30}" for index in range(40)])
    split = split_prompts(data(path, share=0.4), seed=0)
    chosen = [problem.question for problem in split.cold_start]
    write_rows(tmp_path / "remaining.jsonl", split.remaining)
    remaining = load_problems(str(tmp_path / "remaining.jsonl"))
    left = [problem.question for problem in remaining]
    assert len(chosen) == len(set(chosen)) == 12
    assert not set(chosen) & set(left) and set(chosen) | set(left) == {f"q{index}" for index in range(30)}
    assert split.num_duplicates == 40 - len(chosen) - len(left)
    # Rows keep their own columns, and are asked as the teacher was.
    assert {problem.template for problem in remaining} == {"boxed"}
    assert all(row["teacher"] == "math" for row in split.remaining)


def test_the_choice_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "p.jsonl", [f"q{index}" for index in range(40)])
    assert split_prompts(data(path), seed=0) == split_prompts(data(path), seed=0)
    assert split_prompts(data(path), seed=0).cold_start != split_prompts(data(path), seed=1).cold_start
    assert len(split_prompts(data(path, num_prompts=7), seed=0).cold_start) == 7


def test_more_prompts_than_there_are_is_refused(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "p.jsonl", ["a", "b"])
    with pytest.raises(ConfigError, match="3 prompts for the cold start of 2 distinct ones"):
        split_prompts(data(path, num_prompts=3), seed=0)


def test_rollouts_are_read_again_and_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    file = RolloutFile(path, IDENTITY)
    file.open("weights")
    for prompt in range(3):
        file.add(rollout(prompt))
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"prompt": 3, "sam')
    again = RolloutFile(path, IDENTITY)
    assert again.rollouts == {(prompt, 0): rollout(prompt) for prompt in range(3)}
    again.open("weights")
    again.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("identity", "fingerprint", "message"),
    [
        ({"teacher": "t", "seed": 1}, "weights", "another seed"),
        (IDENTITY, "other weights", "another teacher_fingerprint"),
    ],
)
def test_rollouts_of_something_else_are_not_gone_on_with(
    tmp_path: Path, identity: dict[str, Any], fingerprint: str, message: str
) -> None:
    file = RolloutFile(tmp_path / "r.jsonl", IDENTITY)
    file.open("weights")
    file.add(rollout(0))
    file.close()
    with pytest.raises(ConfigError, match=message):
        RolloutFile(tmp_path / "r.jsonl", identity).open(fingerprint)


def test_a_file_that_holds_no_rollouts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="is no file of rollouts"):
        RolloutFile(path, IDENTITY)
