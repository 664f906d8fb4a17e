"""Prompts as token ids, the way student and teacher each see them.

Both sides go through a chat template. The teacher may see another wording or template than the student (section 5.2 of
the paper); by default it sees the student's very ids.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from opd.errors import ConfigError, first_line
from opd.types import Ids
from services.trainer.prompts.context import with_context
from services.trainer.prompts.problems import PromptProblem, retemplate

logger = logging.getLogger(__name__)


class Overlong(StrEnum):
    """What happens to a prompt above the limit."""

    FILTER = "filter"
    """Left out, with a count in the log."""
    REFUSE = "refuse"
    """Ends the run before it starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptView:
    """How one side, student or teacher, sees a prompt."""

    tokenizer: Any
    """With a chat template."""
    template: str | None = None
    """Asks the question in this template instead of the problem's own."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Passed to the chat template, such as enable_thinking."""
    context: str = ""
    """Text after the question with `{answer}`, `{context}` and `{question}` filled in: privileged, for a teacher's view
    alone."""

    def encode(self, problem: PromptProblem) -> Ids:
        """[P] token ids up to where the assistant's response begins."""
        shown = with_context(problem, self.context) if self.context else problem
        seen = shown if self.template is None else retemplate(shown, self.template)
        try:
            token_ids = self.tokenizer.apply_chat_template(
                [dict(message) for message in seen.messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **self.chat_template_kwargs,
            )
        except Exception as error:  # A chat template is a program and may fail in any way.
            raise ConfigError(
                f"{problem.name}: the chat template refuses it ({first_line(error)}); "
                "change the row or chat_template_kwargs"
            ) from error
        return np.asarray(token_ids, dtype=np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedPrompt:
    """A prompt as student and teacher see it; has all that a training step wants of a prompt."""

    problem: PromptProblem
    prompt_token_ids: Ids
    """[P] as the student sees it."""
    teacher_prompt_token_ids: Ids
    """[P'] as the teacher sees it."""
    template: str
    """In which the student is asked, so in which form it answers."""

    @property
    def answer(self) -> str | None:
        return self.problem.answer

    @property
    def teacher(self) -> str:
        return self.problem.teacher


def tokenize_problems(
    problems: Sequence[PromptProblem],
    student: PromptView,
    *,
    teacher: PromptView | None = None,
    max_prompt_tokens: int,
    overlong: Overlong = Overlong.FILTER,
) -> list[TokenizedPrompt]:
    """Token ids for both sides, in order; without a view of its own the teacher sees the student's ids.

    The limit is on the student's ids. Raises `ConfigError` for a refused or empty prompt, or when none is left.
    """
    kept: list[TokenizedPrompt] = []
    for problem in problems:
        token_ids = student.encode(problem)
        if token_ids.size == 0:
            raise ConfigError(
                f"{problem.name}: the chat template makes no tokens of it; remove the row or change the template"
            )
        if token_ids.size <= max_prompt_tokens:
            seen = token_ids if teacher is None else teacher.encode(problem)
            template = problem.template if student.template is None else student.template
            kept.append(
                TokenizedPrompt(
                    problem=problem, prompt_token_ids=token_ids, teacher_prompt_token_ids=seen, template=template
                )
            )
        elif overlong is Overlong.REFUSE:
            raise ConfigError(
                f"{problem.name}: {token_ids.size} tokens are above max_prompt_tokens={max_prompt_tokens}; raise it or "
                "set overlong=filter"
            )
    num_filtered = len(problems) - len(kept)
    if num_filtered:
        logger.warning("%d of %d prompts are above %d tokens: left out", num_filtered, len(problems), max_prompt_tokens)
    if not kept:
        raise ConfigError(f"no prompt has at most max_prompt_tokens={max_prompt_tokens} tokens; raise it")
    return kept
