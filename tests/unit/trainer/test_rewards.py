"""What a verified answer is worth, and that every prompt has one."""

import dataclasses
from typing import Any

import pytest

from opd.errors import ConfigError, InternalError
from services.trainer.prompts import PromptProblem, TokenizedPrompt
from services.trainer.rewards import AnswerReward, require_answers
from tests.unit.trainer.test_batch import scored
from tests.unit.trainer.tiny_training import TinyPrompt

ROLLOUT = scored("a", [5], [8]).rollout
PROMPT = TinyPrompt(
    prompt_token_ids=ROLLOUT.prompt_token_ids,
    teacher_prompt_token_ids=ROLLOUT.prompt_token_ids,
    template="dapo",
    answer="1/2",
)


@pytest.mark.parametrize(
    ("template", "text", "reward"),
    [
        ("dapo", "So.\nAnswer: 0.5", 1.0),
        ("dapo", "So.\nAnswer: 2", 0.0),
        ("dapo", r"\boxed{1/2}", 0.0),
        ("boxed", r"\boxed{\frac{1}{2}}", 1.0),
        ("boxed", "Answer: 1/2", 0.0),
        ("boxed", "", 0.0),
    ],
)
def test_only_the_templates_own_form_earns(template: str, text: str, reward: float) -> None:
    prompt = dataclasses.replace(PROMPT, template=template)
    assert AnswerReward(lambda ids: text if ids == [8] else "")(ROLLOUT, prompt) == reward


def tokenized(index: int, **changes: Any) -> TokenizedPrompt:
    problem = PromptProblem(
        index=index,
        messages=(),
        question="",
        template="dapo",
        answer=changes.get("answer", "1/2"),
        source="sums",
        level="",
    )
    ids = ROLLOUT.prompt_token_ids
    template = changes.get("template", "dapo")
    return TokenizedPrompt(problem=problem, prompt_token_ids=ids, teacher_prompt_token_ids=ids, template=template)


def test_a_prompt_that_cannot_be_verified_is_refused_at_the_start_by_its_row() -> None:
    """Rows that were left out for their length come before it, so that its place is not its row."""
    require_answers([tokenized(5)])
    with pytest.raises(ConfigError, match=r"^data\.files: prompt 7 of sums has no answer, .*; correct the row"):
        require_answers([tokenized(5), tokenized(7, answer=None)])
    with pytest.raises(ConfigError, match=r"prompt 9 of sums has no known template"):
        require_answers([tokenized(9, template="")])


def test_a_rollout_without_an_answer_is_a_fault_of_ours() -> None:
    with pytest.raises(InternalError, match=r"^rollout a: its prompt has no answer"):
        AnswerReward(lambda ids: "")(ROLLOUT, dataclasses.replace(PROMPT, answer=None))
