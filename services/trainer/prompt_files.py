"""From the `data` section of a configuration to the prompts of every step."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.trainer.config import DataSettings, TrainSettings
from services.trainer.models import load_tokenizer
from services.trainer.prompts import (
    PromptSchedule,
    PromptView,
    TeacherColumn,
    TokenizedPrompt,
    load_problems,
    tokenize_problems,
)
from services.trainer.rewards import require_answers


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedPrompts:
    """The schedule, and what a resumed run has to find unchanged."""

    schedule: PromptSchedule
    digest: str
    """Hash over every prompt's ids and teacher in order: the schedule's position means nothing for other prompts.

    Where sources take turns, a point and a hash over every prompt's source follow.
    """
    longest: Mapping[str, TokenizedPrompt]
    """By teacher, of the prompts that are trained on the one that is longest as the teacher sees it."""

    def are_those_of(self, digest: str) -> bool:
        """Whether `digest`, which in an earlier version's record is without the sources', is of the same prompts."""
        return digest in (self.digest, self.digest.partition(".")[0])


def prepare_prompts(settings: TrainSettings, tokenizer: Any) -> PreparedPrompts:
    """Reads, renders and tokenizes all files; `ConfigError` names file, row and column."""
    data, rollout = settings.data, settings.rollout
    column = data.teacher_column and TeacherColumn(name=data.teacher_column, teachers=tuple(settings.teachers))
    problems = [
        problem
        for file in data.files
        for problem in load_problems(
            file, split=data.split, teacher_column=column or None, context_column=data.teacher_context_column
        )
    ]
    student, teacher = views(data, tokenizer)
    prompts = tokenize_problems(
        problems,
        student,
        teacher=teacher,
        max_prompt_tokens=rollout.max_prompt_tokens,
        overlong=data.overlong,
    )
    if settings.objective.uses_outcome:
        require_answers(prompts)
    schedule = PromptSchedule(
        prompts,
        prompts_per_step=rollout.prompts_per_step,
        seed=settings.seed,
        num_epochs=data.num_epochs,
        source_weights=data.source_weights,
    )
    digest = _digest(prompts)
    if data.source_weights is not None:
        digest += f".{_sources_digest(prompts)}"
    return PreparedPrompts(schedule=schedule, digest=digest, longest=_longest(prompts, data))


def _longest(prompts: Sequence[TokenizedPrompt], data: DataSettings) -> dict[str, TokenizedPrompt]:
    weights, longest = data.source_weights, dict[str, TokenizedPrompt]()
    for prompt in prompts:
        # A source with weight 0 is left out of the schedule.
        if weights is not None and not weights[prompt.problem.source]:
            continue
        known = longest.setdefault(prompt.teacher, prompt)
        if prompt.teacher_prompt_token_ids.size > known.teacher_prompt_token_ids.size:
            longest[prompt.teacher] = prompt
    return longest


def views(data: DataSettings, tokenizer: Any) -> tuple[PromptView, PromptView | None]:
    """How student and teacher see prompts; None where the teacher is to see the student's own ids."""
    student = PromptView(tokenizer=tokenizer, template=data.template, chat_template_kwargs=data.chat_template_kwargs)
    own = (data.teacher_tokenizer, data.teacher_template, data.teacher_chat_template_kwargs, data.teacher_context)
    if own == ("", None, None, None):
        return student, None
    kwargs = data.teacher_chat_template_kwargs
    return student, PromptView(
        tokenizer=load_tokenizer(data.teacher_tokenizer) if data.teacher_tokenizer else tokenizer,
        template=data.teacher_template or data.template,
        chat_template_kwargs=data.chat_template_kwargs if kwargs is None else kwargs,
        context=data.teacher_context or "",
    )


def _digest(prompts: Sequence[TokenizedPrompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        for token_ids in (prompt.prompt_token_ids, prompt.teacher_prompt_token_ids):
            digest.update(token_ids.size.to_bytes(4, "little"))
            digest.update(token_ids.tobytes())
        digest.update(prompt.teacher.encode() + b"\0")
    return digest.hexdigest()[:32]


def _sources_digest(prompts: Sequence[TokenizedPrompt]) -> str:
    sources = "\0".join(prompt.problem.source for prompt in prompts)
    return hashlib.sha256(sources.encode()).hexdigest()[:32]
