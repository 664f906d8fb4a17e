"""What a verified answer is worth, and that there is one for every prompt.

The reward is 1 for a right answer in the template's own form and 0 for anything else: a template's extractor reads its
own responses alone ("Answer:" lines, or the last box), so a right answer in another form earns nothing.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from opd.errors import ConfigError, InternalError
from opd.types import Rollout
from services.trainer.evaluation.grading import grade
from services.trainer.prompts import TokenizedPrompt


class AnsweredPrompt(Protocol):
    """What of a prompt decides whether a response is right."""

    @property
    def template(self) -> str: ...
    @property
    def answer(self) -> str | None: ...


class AnswerReward:
    """1.0 or 0.0 for each rollout; `decode` gives the text of response ids."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode

    def __call__(self, rollout: Rollout, prompt: AnsweredPrompt) -> float:
        if prompt.answer is None:
            raise InternalError(f"rollout {rollout.rollout_id}: its prompt has no answer to be graded against")
        return float(grade(prompt.template, self._decode(rollout.response_token_ids.tolist()), prompt.answer))


def require_answers(prompts: Sequence[TokenizedPrompt]) -> None:
    """Raises `ConfigError` for the first prompt whose responses cannot be verified."""
    for prompt in prompts:
        missing = "answer" if prompt.answer is None else "" if prompt.template else "known template"
        if missing:
            raise ConfigError(
                f"data.files: {prompt.problem.name} has no {missing}, so it cannot be verified as the objective's "
                "outcome wants; correct the row or set data.template"
            )
