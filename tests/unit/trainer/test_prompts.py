"""Prompt sets, their two views, and the schedule of a run."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd.errors import ConfigError
from services.trainer.prompts import (
    Overlong,
    PromptProblem,
    PromptSchedule,
    PromptView,
    TokenizedPrompt,
    load_problems,
    retemplate,
    tokenize_problems,
)
from services.trainer.prompts.problems import _dataset_rows
from services.trainer.templates import TEMPLATES

SHARED_DATA = Path(__file__).parents[4] / "shared" / "data"
CHAT = (
    "{% if not enable_thinking %}quiet {% endif %}"
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def row(question: str = "1 + 1 ?", template: str = "boxed", **changes: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": TEMPLATES[template].render(question)}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "data_source": "sums",
        "extra_info": {"index": 7, "level": 3},
    } | changes


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return str(path)


def tokenizer(chat_template: str = CHAT) -> Any:
    words = ["user", "assistant", "system", "quiet", "other", "Q", "1", "+", "?", "[UNK]"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    wrapped.chat_template = chat_template
    return wrapped


def problem(index: int, words: int = 1, source: str = "sums") -> PromptProblem:
    content = " ".join(["Q"] * words)
    return PromptProblem(
        index=index,
        messages=({"role": "user", "content": content},),
        question=content,
        template="",
        answer="2",
        source=source,
        level="",
    )


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rows_are_read_in_both_forms(form: str, tmp_path: Path) -> None:
    rows = [row(), row("2 + 2 ?", "dapo", data_source="others", extra_info={"level": None})]
    path = tmp_path / f"set.{form}"
    if form == "jsonl":
        write_jsonl(path, rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = load_problems(str(path))
    assert first == PromptProblem(
        index=0,
        messages=({"role": "user", "content": TEMPLATES["boxed"].render("1 + 1 ?")},),
        question="1 + 1 ?",
        template="boxed",
        answer="2",
        source="sums",
        level="3",
    )
    assert (second.index, second.question, second.template, second.source, second.level) == (
        1,
        "2 + 2 ?",
        "dapo",
        "others",
        "",
    )


def test_a_data_set_is_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real library, for which a folder of files is a data set too."""
    folder = tmp_path / "sums"
    folder.mkdir()
    write_jsonl(folder / "test.jsonl", [row(), row("3 + 3 ?")])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = list(_dataset_rows(str(folder), "test"))
    assert [item["prompt"] for item in found] == [row()["prompt"], row("3 + 3 ?")["prompt"]]
    with pytest.raises(ConfigError, match=r"split 'train' cannot be loaded .*; give a \.parquet"):
        list(_dataset_rows(str(folder), "train"))


def test_questions_can_be_asked_in_another_template(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = row(prompt=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3 ?"}])
    path = write_jsonl(tmp_path / "set.jsonl", [row(), bare])
    found = load_problems(path, template="dapo")
    assert [item.template for item in found] == ["dapo", "dapo"]
    assert found[0].messages[-1]["content"] == TEMPLATES["dapo"].render("1 + 1 ?")
    assert found[1].messages[-1]["content"] == TEMPLATES["dapo"].render("2 + 3 ?")
    assert found[1].messages[0] == {"role": "system", "content": "Be brief."}
    assert "1 of 2 prompts are taken for bare questions" in caplog.text
    assert load_problems(path)[1].template == ""


def test_a_prompt_may_be_a_plain_text_and_an_answer_may_be_absent(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "plain.jsonl", [{"prompt": "2 + 2 ?"}, {"prompt": "3 ?", "reward_model": {}}])
    first, second = load_problems(path)
    assert (first.messages, first.answer, first.source) == (({"role": "user", "content": "2 + 2 ?"},), None, "plain")
    assert second.answer is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": None}, "row 1: column prompt is missing"),
        ({"prompt": []}, "row 1: column prompt is"),
        ({"prompt": 5}, "row 1: column prompt is 5"),
        ({"prompt": ["hello"]}, "row 1: column prompt has the message 'hello'"),
        ({"prompt": [{"role": "oracle", "content": "x"}]}, "row 1: column prompt has the message"),
        ({"prompt": [{"role": "user", "content": "  "}]}, "row 1: column prompt has an empty user message"),
        ({"prompt": [{"role": "user", "content": None}]}, "row 1: column prompt has an empty user message"),
        ({"prompt": ""}, "row 1: column prompt"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "ends with a message of the assistant"),
        ({"reward_model": "2"}, "row 1: column reward_model is '2'"),
    ],
)
def test_a_bad_row_is_named(bad: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "set.jsonl", [row(), row(**bad)])
    with pytest.raises(ConfigError, match=message) as caught:
        load_problems(path)
    assert str(caught.value).startswith(f"data {path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("missing.parquet", None, "no such file"),
        ("set.jsonl", b'{"prompt": \n', "line 1 is not JSON"),
        ("set.jsonl", b"5\n", "row 0 is not an object"),
        ("set.jsonl", b"", "it has no rows"),
        ("set.parquet", b"PAR1 not really", "not a readable parquet file"),
        ("set.csv", b"a,b\n", "not a prompt set"),
    ],
)
def test_a_bad_file_is_named(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_problems(str(path))
    assert str(path) in str(caught.value)


def test_tokens_are_those_of_the_chat_template() -> None:
    view = PromptView(tokenizer=tokenizer(), chat_template_kwargs={"enable_thinking": True})
    assert view.encode(problem(0, words=2)).tolist() == [0, 5, 5, 1]
    assert view.encode(problem(0)).dtype == np.int32
    assert PromptView(tokenizer=tokenizer()).encode(problem(0)).tolist() == [3, 0, 5, 1]


def test_the_teacher_sees_the_students_ids_unless_it_has_a_view() -> None:
    student = PromptView(tokenizer=tokenizer())
    (same,) = tokenize_problems([problem(0)], student, max_prompt_tokens=10)
    assert same.teacher_prompt_token_ids is same.prompt_token_ids
    teacher = PromptView(tokenizer=tokenizer("other {{ messages[0]['content'] }}"), template="boxed")
    (apart,) = tokenize_problems([problem(0)], student, teacher=teacher, max_prompt_tokens=10)
    assert apart.prompt_token_ids.tolist() == [3, 0, 5, 1]
    assert apart.teacher_prompt_token_ids[:2].tolist() == [4, 5]
    assert apart.teacher_prompt_token_ids.size > 10
    assert (apart.answer, apart.template) == ("2", "")
    (asked,) = tokenize_problems(
        [problem(0)], PromptView(tokenizer=tokenizer(), template="boxed"), max_prompt_tokens=99
    )
    assert asked.template == "boxed"


def test_overlong_prompts_are_filtered_with_a_count_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    problems = [problem(index, words=index + 1) for index in range(5)]
    view = PromptView(tokenizer=tokenizer())
    with caplog.at_level(logging.WARNING):
        kept = tokenize_problems(problems, view, max_prompt_tokens=6)
    assert [prompt.problem.index for prompt in kept] == [0, 1, 2]
    assert "2 of 5 prompts are above 6 tokens: left out" in caplog.text
    with pytest.raises(ConfigError, match="prompt 3 of sums: 7 tokens are above max_prompt_tokens=6"):
        tokenize_problems(problems, view, max_prompt_tokens=6, overlong=Overlong.REFUSE)
    with pytest.raises(ConfigError, match="no prompt has at most max_prompt_tokens=3"):
        tokenize_problems(problems, view, max_prompt_tokens=3)


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [("{{ raise_exception('no system role') }}", "no system role"), ("", "makes no tokens of it")],
)
def test_what_the_chat_template_refuses_is_named(chat_template: str, message: str) -> None:
    view = PromptView(tokenizer=tokenizer(chat_template or "{% if false %}x{% endif %}"))
    with pytest.raises(ConfigError, match=f"prompt 4 of sums: .*{message}"):
        tokenize_problems([problem(4)], view, max_prompt_tokens=9)


def test_retemplating_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match="choose one of boxed, dapo"):
        retemplate(problem(0), "plain")


def prompts(*sizes: tuple[str, int]) -> list[TokenizedPrompt]:
    ids = np.array([1], np.int32)
    problems = [problem(index, source=source) for source, size in sizes for index in range(size)]
    return [
        TokenizedPrompt(problem=item, prompt_token_ids=ids, teacher_prompt_token_ids=ids, template="")
        for item in problems
    ]


def names(step: list[TokenizedPrompt]) -> list[tuple[str, int]]:
    return [(prompt.problem.source, prompt.problem.index) for prompt in step]


def test_every_epoch_takes_each_prompt_once_in_another_order() -> None:
    schedule = PromptSchedule(prompts(("sums", 12)), prompts_per_step=4, seed=3, num_epochs=2)
    assert schedule.num_steps == 6
    epochs = [
        [name for step in steps for name in names(schedule.step_prompts(step))] for steps in ((0, 1, 2), (3, 4, 5))
    ]
    assert [sorted(index for _, index in epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1]


def test_a_step_is_a_function_of_seed_and_number_alone() -> None:
    def schedule(seed: int) -> PromptSchedule:
        weights = {"sums": 2.0, "others": 1.0}
        return PromptSchedule(
            prompts(("sums", 9), ("others", 5)), prompts_per_step=4, seed=seed, source_weights=weights
        )

    forwards = [names(schedule(1).step_prompts(step)) for step in range(8)]
    one = schedule(1)
    backwards = [names(one.step_prompts(step)) for step in reversed(range(8))][::-1]
    assert forwards == backwards
    assert forwards != [names(schedule(2).step_prompts(step)) for step in range(8)]
    assert len({tuple(step) for step in forwards}) == 8


def test_sources_take_turns_by_weight_however_large_they_are() -> None:
    weights = {"sums": 3.0, "others": 1.0, "left": 0.0}
    schedule = PromptSchedule(
        prompts(("sums", 5), ("others", 50), ("left", 9)), prompts_per_step=8, seed=0, source_weights=weights
    )
    for step in range(20):
        assert Counter(source for source, _ in names(schedule.step_prompts(step))) == {"sums": 6, "others": 2}
    seen = Counter(
        index for step in range(20) for source, index in names(schedule.step_prompts(step)) if source == "sums"
    )
    assert seen == dict.fromkeys(range(5), 24)
    assert schedule.num_steps == 55 // 8


def test_a_set_smaller_than_a_step_is_gone_through_several_times() -> None:
    schedule = PromptSchedule(prompts(("sums", 3)), prompts_per_step=7, seed=0)
    assert schedule.num_steps == 1
    assert sorted(Counter(names(schedule.step_prompts(0))).values()) == [2, 2, 3]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"sums": 1.0}, "has sums, the prompts have others, sums"),
        ({"sums": 1.0, "others": 1.0, "more": 1.0}, "has more, others, sums"),
        ({"sums": -1.0, "others": 1.0}, "cannot be shares"),
        ({"sums": 0.0, "others": 0.0}, "cannot be shares"),
        ({"sums": float("nan"), "others": 1.0}, "cannot be shares"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptSchedule(prompts(("sums", 2), ("others", 2)), prompts_per_step=1, seed=0, source_weights=weights)


@pytest.mark.parametrize("changes", [{"prompts_per_step": 0}, {"num_epochs": 0}])
def test_counts_below_one_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must both be at least 1"):
        PromptSchedule(prompts(("sums", 2)), seed=0, **({"prompts_per_step": 1} | changes))


@pytest.mark.shared_data
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "template", "count", "distinct"),
    [
        ("AIME24", "boxed", 30, 30),
        ("AIME25", "boxed", 30, 30),
        ("AMC23", "boxed", 83, 83),
        ("MATH-500", "boxed", 500, 500),
        ("DeepMath_deduped", "boxed", 14116, 14085),
        ("dapo-math-17k", "dapo", 17917, 17398),
        ("dapo-math-17k-processed", "boxed", 17917, 17398),
    ],
)
def test_every_row_of_the_real_sets_is_recognised(name: str, template: str, count: int, distinct: int) -> None:
    path = SHARED_DATA / f"{name}.parquet"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside the checkout")
    found = load_problems(str(path))
    assert Counter(item.template for item in found) == {template: count}
    assert len({item.question for item in found}) == distinct
    assert all(item.answer for item in found)
