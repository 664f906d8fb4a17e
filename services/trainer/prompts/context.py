"""Privileged context: what a teacher reads after the question and the student does not.

A teacher that sees the answer or a worked solution can tell the student's good tokens from its bad ones although it is
the same model (self-distillation). Other braces than those of the three names stay as they are, so that LaTeX
needs no escape.
"""

import re
from dataclasses import replace

from opd.errors import ConfigError
from services.trainer.prompts.problems import PromptProblem, retemplate

_FIELD = re.compile(r"\{(answer|context|question)\}")


def with_context(problem: PromptProblem, text: str) -> PromptProblem:
    """The problem with `text` after its question, `{answer}`, `{context}` and `{question}` filled in.

    A prompt in a known template is asked in that template again, so that its closing words stay last. `ConfigError` for
    a row that lacks what the text wants of it.
    """

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        value: str | None = getattr(problem, name)
        if not value:
            way_out = "set data.teacher_context_column" if name == "context" else "remove the row"
            raise ConfigError(
                f"{problem.name}: data.teacher_context wants its {name}, and it has none; "
                f"{way_out}, or leave {match.group()} out"
            )
        return value

    added = _FIELD.sub(fill, text)
    if problem.template:
        return retemplate(replace(problem, question=f"{problem.question}{added}"), problem.template)
    last = problem.messages[-1]
    messages = (*problem.messages[:-1], {**last, "content": f"{last['content']}{added}"})
    return replace(problem, question=f"{problem.question}{added}", messages=messages)
