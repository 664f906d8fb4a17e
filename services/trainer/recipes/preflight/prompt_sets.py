"""The prompts of a preflight: drawn once by the seed, and asked in several templates."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.trainer.config import DataSettings
from services.trainer.prompt_files import views
from services.trainer.prompts import PromptProblem, TokenizedPrompt, load_problems, tokenize_problems
from services.trainer.recipes.preflight.settings import AS_IS, PreflightSettings
from services.trainer.templates import get_template

_NO_LIMIT = 2**31


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSets:
    """The same problems in each way of asking; all lists are in the same order, the templates' shorter."""

    by_template: Mapping[str, Sequence[TokenizedPrompt]]
    """`as-is` first."""
    same_as_is: tuple[str, ...]
    """Templates left out because the prompts are in them already."""
    digest: str
    """Hash over all prompts below the limit, from which a pilot draws, with their answers."""


def data_settings(settings: PreflightSettings) -> DataSettings:
    """The prompts as the training run is to have them, which goes on as long as its steps say."""
    return DataSettings(
        files=settings.prompts,
        split=settings.split,
        chat_template_kwargs=settings.chat_template_kwargs,
        teacher_tokenizer=settings.teacher_tokenizer,
        teacher_template=settings.teacher_template,
        teacher_chat_template_kwargs=settings.teacher_chat_template_kwargs,
        num_epochs=1000,
    )


def draw_prompts(settings: PreflightSettings, tokenizer: Any) -> PromptSets:
    """Reads all files, draws `num_prompts`; `ConfigError` for a bad file, an unknown template or no prompt at all."""
    for name in settings.templates:
        get_template(name)
    problems = [problem for file in settings.prompts for problem in load_problems(file, split=settings.split)]
    order = np.random.default_rng([settings.seed, len(problems)]).permutation(len(problems))
    data = data_settings(settings)
    fitting = _asked([problems[place] for place in order], data, tokenizer, settings.max_prompt_tokens)
    prompts = fitting[: settings.num_prompts]
    by_template: dict[str, Sequence[TokenizedPrompt]] = {AS_IS: prompts}
    same = []
    for name in settings.templates:
        chosen = [prompt.problem for prompt in prompts[: settings.template_prompts]]
        if all(problem.template == name for problem in chosen):
            same.append(name)
        else:
            by_template[name] = _asked(chosen, data.model_copy(update={"template": name}), tokenizer, _NO_LIMIT)
    return PromptSets(by_template=by_template, same_as_is=tuple(same), digest=_digest(fitting))


def told_of(prompt: TokenizedPrompt) -> list[Any]:
    """Everything of a prompt that decides what is sampled, scored and graded."""
    asked = (prompt.prompt_token_ids.tolist(), prompt.teacher_prompt_token_ids.tolist())
    return [*asked, prompt.template, prompt.answer]


def _digest(prompts: Sequence[TokenizedPrompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(told_of(prompt)).encode())
    return digest.hexdigest()[:32]


def _asked(
    problems: Sequence[PromptProblem], data: DataSettings, tokenizer: Any, max_prompt_tokens: int
) -> list[TokenizedPrompt]:
    student, teacher = views(data, tokenizer)
    return tokenize_problems(problems, student, teacher=teacher, max_prompt_tokens=max_prompt_tokens)
