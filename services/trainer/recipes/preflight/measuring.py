"""Samples from the student, has every teacher score it, and writes down sums per prompt.

Each rollout is scored by all teachers, so that teachers are compared on the same responses. A rollout's seed comes from
its prompt and number alone: what is sampled does not depend on where a preflight was cut off.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opd.types import FinishReason, Rollout, ScoreReply, Scores, rollout_id
from services.trainer.diagnostics import POSITION_EDGES, position_metrics, positions_of
from services.trainer.diagnostics.means import bucketed, mean_of
from services.trainer.diagnostics.outcomes import teacher_reward
from services.trainer.evaluation.grading import grade
from services.trainer.models import LoadedModel
from services.trainer.prompts import TokenizedPrompt
from services.trainer.recipes.preflight.prompt_sets import PromptSets
from services.trainer.recipes.preflight.records import AnswerRecord, PromptRecord, RecordFile, TeacherRecord
from services.trainer.recipes.preflight.settings import AS_IS, PreflightSettings
from services.trainer.recipes.preflight.teachers import MetTeacher
from services.trainer.rollout.base import RolloutRequest, SamplingParams, derive_seed
from services.trainer.rollout.transformers_engine import TransformersEngine
from services.trainer.teachers import TeacherRouter

_PROMPTS_PER_CHUNK = 32
BY_POSITION = ("loss/reverse_kl", "distill/overlap_ratio", "distill/overlap_mass_student", "distill/entropy_gap")

Progress = Callable[[str, int, int], None]
"""What is being done, how many of how many are finished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredByAll:
    """A rollout with every teacher's scores by name."""

    rollout: Rollout
    scores: dict[str, Scores]


class Measuring:
    """One preflight's sampling and scoring."""

    def __init__(
        self,
        settings: PreflightSettings,
        student: LoadedModel,
        teachers: Sequence[MetTeacher],
        sets: PromptSets,
        records: RecordFile,
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._student = student
        self._teachers = teachers
        self._sets = sets
        self._records = records
        self._progress = progress
        # A pool must not answer with what it remembers of an earlier preflight's rollouts.
        self._run = f"preflight-{secrets.token_hex(4)}"
        self._calls = 0

    def measure(self) -> None:
        """Fills the records that are missing."""
        for template, prompts in self._sets.by_template.items():
            name = f"student, {template}"
            known = {place for kept, place in self._records.prompts if kept == template}
            for places in self._missing(name, len(prompts), known.__contains__):
                chosen = [prompts[place] for place in places]
                for place, prompt, items in zip(places, chosen, self.scored(chosen, places), strict=True):
                    self._records.add(self._prompt_record(template, place, prompt, items))
        for teacher in self._teachers:
            if teacher.loaded is not None and teacher.router is not None:
                self.answer(teacher.name, teacher.loaded)

    def scored(self, prompts: Sequence[TokenizedPrompt], places: Sequence[int]) -> list[list[ScoredByAll]]:
        """Rollouts of each prompt with all scores; `places` decide the seeds."""
        replies: dict[tuple[str, str], Future[ScoreReply]] = {}

        def send(rollout: Rollout) -> None:
            for name, router in self._routers():
                replies[rollout.rollout_id, name] = router.send(rollout, prompts[rollout.group])

        rollouts = self._sample(self._student, prompts, places, send, score_top_k=self._settings.objective.score_top_k)
        items: list[list[ScoredByAll]] = [[] for _ in prompts]
        for rollout in rollouts:
            scores = {
                name: router.accept(rollout, prompts[rollout.group], replies[rollout.rollout_id, name].result())
                for name, router in self._routers()
            }
            items[rollout.group].append(ScoredByAll(rollout=rollout, scores=scores))
        return items

    def _routers(self) -> Iterator[tuple[str, TeacherRouter]]:
        return ((teacher.name, teacher.router) for teacher in self._teachers if teacher.router is not None)

    def _missing(self, name: str, total: int, is_done: Callable[[int], bool]) -> Iterator[list[int]]:
        """Chunks of places that have no record yet, telling the progress before and after each."""
        open_places = [place for place in range(total) if not is_done(place)]
        for start in range(0, len(open_places), _PROMPTS_PER_CHUNK):
            self._progress(name, total - len(open_places) + start, total)
            yield open_places[start : start + _PROMPTS_PER_CHUNK]
        self._progress(name, total, total)

    def _sample(
        self,
        model: LoadedModel,
        prompts: Sequence[TokenizedPrompt],
        places: Sequence[int],
        on_finish: Callable[[Rollout], None] | None,
        *,
        score_top_k: int | None,
    ) -> list[Rollout]:
        settings = self._settings
        per_prompt = settings.rollouts_per_prompt
        self._calls += 1
        requests = [
            RolloutRequest(
                rollout_id=rollout_id(self._run, self._calls, group * per_prompt + number),
                group=group,
                prompt_token_ids=prompt.prompt_token_ids,
                seed=derive_seed(settings.seed, place, number),
            )
            for group, (prompt, place) in enumerate(zip(prompts, places, strict=True))
            for number in range(per_prompt)
        ]
        sampling = SamplingParams(
            temperature=settings.temperature, max_response_tokens=settings.max_response_tokens, seed=settings.seed
        )
        return engine_of(model, settings, score_top_k=score_top_k).sample(requests, sampling, on_finish=on_finish)

    def _prompt_record(
        self, template: str, place: int, prompt: TokenizedPrompt, items: Sequence[ScoredByAll]
    ) -> PromptRecord:
        rollouts = [item.rollout for item in items]
        return PromptRecord(
            template=template,
            prompt=place,
            is_correct=[_grade(rollout, prompt, self._student.tokenizer) for rollout in rollouts],
            num_tokens=[int(rollout.response_token_ids.size) for rollout in rollouts],
            is_truncated=[rollout.finish_reason is FinishReason.LENGTH for rollout in rollouts],
            teachers={name: teacher_record(items, name) for name, _ in self._routers()},
        )

    def answer(self, name: str, loaded: LoadedModel) -> None:
        """Samples a model's own responses to the prompts as they are, with the student's seeds, for its accuracy."""
        prompts, done = self._sets.by_template[AS_IS], self._records.answers
        known = [place for place, prompt in enumerate(prompts) if prompt.answer is not None and prompt.template]
        for numbers in self._missing(f"{name}, answers", len(known), lambda number: (name, known[number]) in done):
            places = [known[number] for number in numbers]
            chosen = [prompts[place] for place in places]
            by_prompt: list[list[Rollout]] = [[] for _ in chosen]
            for rollout in self._sample(loaded, chosen, places, None, score_top_k=None):
                by_prompt[rollout.group].append(rollout)
            for place, prompt, rollouts in zip(places, chosen, by_prompt, strict=True):
                self._records.add(
                    AnswerRecord(
                        model=name,
                        prompt=place,
                        is_correct=[_grade(rollout, prompt, loaded.tokenizer) for rollout in rollouts],
                        num_tokens=[int(rollout.response_token_ids.size) for rollout in rollouts],
                    )
                )


def engine_of(model: LoadedModel, settings: PreflightSettings, *, score_top_k: int | None) -> TransformersEngine:
    """Samples as a training run does."""
    return TransformersEngine(
        model.model,
        eos_token_ids=model.eos_token_ids,
        num_defined_ids=model.num_defined_ids,
        score_top_k=score_top_k,
        max_slots=settings.max_slots,
        autocast_dtype=torch.bfloat16 if model.model.device.type == "cuda" else None,
    )


def teacher_record(items: Sequence[ScoredByAll], name: str) -> TeacherRecord:
    """Sums over all positions of one prompt's rollouts."""
    totals: dict[str, list[float]] = {}
    buckets: dict[str, tuple[list[float], list[float]]] = {}
    rewards: list[float | None] = []
    for item in items:
        scored = positions_of(item.rollout, item.scores[name])
        for key, values_T in position_metrics(scored).items():
            defined_T = ~np.isnan(values_T)
            mean = mean_of(values_T[defined_T])
            sums = totals.setdefault(key, [0.0, 0.0])
            sums[0], sums[1] = sums[0] + mean.total, sums[1] + mean.count
            if key in BY_POSITION:
                _add_buckets(buckets, key, values_T[defined_T], scored.positions_T[defined_T])
        student_T, teacher_T = scored.student_sampled_logprobs_T, scored.teacher_sampled_logprobs_T
        rewards.append(None if student_T is None or teacher_T is None else teacher_reward(student_T, teacher_T))
    metrics = {key: (total, count) for key, (total, count) in totals.items()}
    return TeacherRecord(metrics=metrics, by_position=buckets, rewards=rewards)


def _add_buckets(
    buckets: dict[str, tuple[list[float], list[float]]], key: str, values_T: Any, positions_T: Any
) -> None:
    means = bucketed(values_T, positions_T, POSITION_EDGES).means
    totals, counts = buckets.setdefault(key, ([0.0] * len(means), [0.0] * len(means)))
    for index, mean in enumerate(means):
        totals[index] += mean.total
        counts[index] += mean.count


def _grade(rollout: Rollout, prompt: TokenizedPrompt, tokenizer: Any) -> bool | None:
    if prompt.answer is None or not prompt.template:
        return None
    text = tokenizer.decode(rollout.response_token_ids.tolist(), skip_special_tokens=True)
    return grade(prompt.template, text, prompt.answer)
