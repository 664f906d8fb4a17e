"""Privileged context reaches the teacher's prompt and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest

from opd.errors import ConfigError
from opd.settings import load_settings
from services.trainer.config import TrainSettings
from services.trainer.prompt_files import prepare_prompts
from services.trainer.prompts import PromptProblem, TokenizedPrompt
from services.trainer.prompts.context import with_context
from services.trainer.templates import get_template
from tests.unit.trainer.tiny_training import tiny_tokenizer

PROBLEM = PromptProblem(
    index=3,
    messages=({"role": "system", "content": "s"}, {"role": "user", "content": get_template("boxed").render("2+2?")}),
    question="2+2?",
    template="boxed",
    answer="4",
    source="sums",
    level="",
    context=r"two and two are \frac{8}{2}",
)


def test_the_text_stands_behind_the_question_and_before_the_templates_closing_words() -> None:
    shown = with_context(PROBLEM, r" It is {answer}: {context}; \boxed{{answer}} to {question} {other}")
    filled = r"2+2? It is 4: two and two are \frac{8}{2}; \boxed{4} to 2+2? {other}"
    assert shown.messages == (PROBLEM.messages[0], {"role": "user", "content": get_template("boxed").render(filled)})
    assert (shown.answer, shown.template) == ("4", "boxed")


def test_a_prompt_in_no_known_template_gets_it_at_its_end() -> None:
    bare = PromptProblem(
        index=0, messages=({"role": "user", "content": "Sum."},), question="Sum.", template="", answer="4", source="s",
        level="",
    )  # fmt: skip
    assert with_context(bare, "\n{answer}").messages == ({"role": "user", "content": "Sum.\n4"},)


@pytest.mark.parametrize(
    ("field", "way_out"), [("answer", "remove the row"), ("context", "set data.teacher_context_column")]
)
def test_a_row_without_what_is_wanted_is_named(field: str, way_out: str) -> None:
    bare = PromptProblem(
        index=3, messages=PROBLEM.messages, question="2+2?", template="", answer=None, source="sums", level=""
    )
    with pytest.raises(ConfigError, match=f"^prompt 3 of sums: .* wants its {field}, and it has none; {way_out}"):
        with_context(bare, f"{{question}} {{{field}}}")


def prompts_of(folder: Path, *overrides: str) -> list[TokenizedPrompt]:
    rows = [
        {"prompt": f"w{2 + i} w9", "reward_model": {"ground_truth": f"w{3 + i}"}, "solution": f"w{4 + i} w8"}
        for i in range(3)
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    files = f'data.files=["{folder / "rows.jsonl"}"]'
    settings = load_settings(TrainSettings, None, ["student.model=x", files, "rollout.prompts_per_step=3", *overrides])
    prompts = prepare_prompts(settings, tiny_tokenizer()).schedule.step_prompts(0)
    return sorted(prompts, key=lambda prompt: prompt.problem.index)


def test_only_the_teachers_ids_change(tmp_path: Path) -> None:
    plain = prompts_of(tmp_path)
    told = prompts_of(tmp_path, "data.teacher_context=' {answer} {context}'", "data.teacher_context_column=solution")
    for one, other in zip(plain, told, strict=True):
        number = one.problem.index
        assert np.array_equal(one.prompt_token_ids, other.prompt_token_ids)
        assert np.array_equal(one.teacher_prompt_token_ids, one.prompt_token_ids)
        assert other.teacher_prompt_token_ids.tolist() == [2 + number, 9, 3 + number, 4 + number, 8, 2]
        assert (one.answer, one.template) == (other.answer, other.template)


@pytest.mark.parametrize(("weight", "size", "name"), [(1, 5, "prompt 1 of long"), (0, 4, "prompt 0 of short")])
def test_the_longest_prompt_is_the_teachers_and_of_those_that_train(
    tmp_path: Path, weight: int, size: int, name: str
) -> None:
    rows = [
        {"prompt": "w2", "reward_model": {"ground_truth": text}, "data_source": source, "by": teacher}
        for text, source, teacher in (("w3 w4", "short", "one"), ("w3 w4 w5", "long", "one"), ("w3", "short", "two"))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    overrides = [
        *("student.model=x", f'data.files=["{tmp_path / "rows.jsonl"}"]', "data.teacher_column=by", "teachers.one={}"),
        *("teachers.two={}", "data.teacher_context=' {answer}'", "data.source_weights.short=1"),
        f"data.source_weights.long={weight}",
    ]
    longest = prepare_prompts(load_settings(TrainSettings, None, overrides), tiny_tokenizer()).longest
    assert longest.keys() == {"one", "two"}
    assert (longest["one"].teacher_prompt_token_ids.size, longest["one"].problem.name) == (size, name)
    assert longest["two"].teacher_prompt_token_ids.size == 3


def test_a_row_without_the_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rows\.jsonl: row 0: column hint is missing; give the text"):
        prompts_of(tmp_path, "data.teacher_context={context}", "data.teacher_context_column=hint")
