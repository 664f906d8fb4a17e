"""From the teacher's responses to examples for the student: filters, and the way from one vocabulary to the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd.vocabulary import describe_vocabulary
from services.trainer.models import load_tokenizer
from services.trainer.prompts import PromptView, TokenizedPrompt
from services.trainer.recipes.cold_start.config import ColdStartSettings
from services.trainer.recipes.cold_start.filters import DropReason, find_fault
from services.trainer.recipes.cold_start.rollout_file import TeacherRollout
from services.trainer.recipes.sft.packing import SftExample


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Examples, and why each other response is none."""

    examples: tuple[SftExample, ...]
    kept: tuple[TeacherRollout, ...]
    """Of each example."""
    dropped: tuple[tuple[TeacherRollout, DropReason], ...]
    shares_vocabulary: bool
    """Whether the student is trained on the very ids that were sampled, or on the text tokenized anew."""


class ExampleBuilder:
    """Puts a prompt and a response as the student sees them.

    With one vocabulary the sampled ids stay, with the EOS the teacher ended on. Otherwise the text is tokenized anew
    and ends on the student's own EOS.
    """

    def __init__(self, settings: ColdStartSettings) -> None:
        self._tokenizer: Any = load_tokenizer(settings.student.model)
        teacher = load_tokenizer(settings.teacher.model)
        self.shares_vocabulary = (
            describe_vocabulary(self._tokenizer).id_map_hash == describe_vocabulary(teacher).id_map_hash
        )
        self._view = PromptView(tokenizer=self._tokenizer, chat_template_kwargs=settings.student.chat_template_kwargs)

    def build(self, prompt: TokenizedPrompt, rollout: TeacherRollout) -> SftExample:
        return SftExample(
            name=f"{rollout.prompt}.{rollout.sample}",
            prompt_token_ids=tuple(self._view.encode(prompt.problem).tolist()),
            response_token_ids=self._response(rollout),
        )

    def _response(self, rollout: TeacherRollout) -> tuple[int, ...]:
        if self.shares_vocabulary:
            return tuple(rollout.token_ids)
        token_ids = self._tokenizer.encode(rollout.text, add_special_tokens=False)
        return (*token_ids, int(self._tokenizer.eos_token_id))


def select(
    settings: ColdStartSettings,
    prompts: Sequence[TokenizedPrompt],
    rollouts: Sequence[TeacherRollout],
    *,
    max_tokens: int,
) -> Selection:
    """Filters in order; `max_tokens` is a row of the fine-tuning."""
    builder = ExampleBuilder(settings)
    examples: list[SftExample] = []
    kept: list[TeacherRollout] = []
    dropped: list[tuple[TeacherRollout, DropReason]] = []
    for rollout in rollouts:
        prompt = prompts[rollout.prompt]
        fault = find_fault(
            rollout.token_ids,
            rollout.text,
            is_truncated=rollout.is_truncated,
            template=prompt.template,
            answer=prompt.answer,
            settings=settings.filters,
        )
        example = builder.build(prompt, rollout) if fault is None else None
        if example is not None and example.num_tokens > max_tokens:
            fault = DropReason.TOO_LONG
        if fault is not None or example is None:
            dropped.append((rollout, fault or DropReason.TOO_LONG))
        else:
            examples.append(example)
            kept.append(rollout)
    return Selection(
        examples=tuple(examples),
        kept=tuple(kept),
        dropped=tuple(dropped),
        shares_vocabulary=builder.shares_vocabulary,
    )
