"""Samples the teacher on the cold-start prompts, whatever of it is not on disk yet."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opd.errors import ConfigError
from opd.types import FinishReason, Rollout
from services.trainer.models import LoadedModel, load_model, load_tokenizer
from services.trainer.prompts import PromptProblem, PromptView, TokenizedPrompt, tokenize_problems
from services.trainer.recipes.cold_start.config import ColdStartRolloutSettings, ColdStartSettings
from services.trainer.recipes.cold_start.rollout_file import RolloutFile, TeacherRollout
from services.trainer.rollout.base import RolloutRequest, SamplingParams, derive_seed
from services.trainer.rollout.transformers_engine import TransformersEngine

_REQUESTS_PER_SLOT = 16
"""An engine's call keeps its rollouts until it returns; this bounds them without leaving slots empty for long."""
Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherPrompts:
    """What the teacher is asked."""

    prompts: tuple[TokenizedPrompt, ...]
    num_overlong: int


def teacher_prompts(settings: ColdStartSettings, problems: Sequence[PromptProblem]) -> TeacherPrompts:
    """The cold-start prompts as the teacher sees them, without those above `rollout.max_prompt_tokens`."""
    teacher = settings.teacher
    view = PromptView(tokenizer=load_tokenizer(teacher.model), chat_template_kwargs=teacher.chat_template_kwargs)
    prompts = tokenize_problems(problems, view, max_prompt_tokens=settings.rollout.max_prompt_tokens)
    return TeacherPrompts(prompts=tuple(prompts), num_overlong=len(problems) - len(prompts))


def sample_teacher(
    settings: ColdStartSettings, prompts: Sequence[TokenizedPrompt], path: Path, advance: Advance
) -> list[TeacherRollout]:
    """Every rollout by prompt and sample; the teacher is loaded only when one is missing.

    `ConfigError` when the file holds other rollouts or the teacher's context is too small for a prompt.
    """
    file = RolloutFile(path, _identity(settings, prompts))
    places = [
        (prompt, sample) for prompt in range(len(prompts)) for sample in range(settings.rollout.rollouts_per_prompt)
    ]
    missing = [place for place in places if place not in file.rollouts]
    advance(len(places) - len(missing))
    if missing:
        loaded = load_model(settings.teacher.model, device=settings.teacher.device, dtype=_dtype(settings))
        try:
            file.open(loaded.fingerprint)
            _fill(file, loaded, prompts, missing, settings, advance)
        finally:
            file.close()
    return [file.rollouts[place] for place in places]


def _fill(
    file: RolloutFile,
    loaded: LoadedModel,
    prompts: Sequence[TokenizedPrompt],
    missing: Sequence[tuple[int, int]],
    settings: ColdStartSettings,
    advance: Advance,
) -> None:
    engine = TransformersEngine(
        loaded.model,
        eos_token_ids=loaded.eos_token_ids,
        num_defined_ids=loaded.num_defined_ids,
        score_top_k=None,
        max_slots=settings.rollout.max_slots,
    )
    sampling = _bounded(settings.rollout, prompts, engine.max_context, settings.seed)

    def keep(rollout: Rollout) -> None:
        file.add(_record(rollout, loaded))
        advance(1)

    chunk = settings.rollout.max_slots * _REQUESTS_PER_SLOT
    for start in range(0, len(missing), chunk):
        requests = [
            RolloutRequest(
                rollout_id=f"{prompt}.{sample}",
                group=prompt,
                prompt_token_ids=prompts[prompt].prompt_token_ids,
                seed=derive_seed(settings.seed, prompt, sample),
            )
            for prompt, sample in missing[start : start + chunk]
        ]
        engine.sample(requests, sampling, on_finish=keep)


def _record(rollout: Rollout, loaded: LoadedModel) -> TeacherRollout:
    prompt, sample = rollout.rollout_id.split(".")
    is_truncated = rollout.finish_reason is FinishReason.LENGTH
    token_ids = rollout.response_token_ids.tolist()
    text = loaded.tokenizer.decode(token_ids if is_truncated else token_ids[:-1], skip_special_tokens=True)
    return TeacherRollout(
        prompt=int(prompt), sample=int(sample), token_ids=token_ids, text=text, is_truncated=is_truncated
    )


def _bounded(
    rollout: ColdStartRolloutSettings, prompts: Sequence[TokenizedPrompt], max_context: int, seed: int
) -> SamplingParams:
    """No more response tokens than fit behind the longest prompt, whatever is missing: a resumed run asks alike."""
    sampling = SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_response_tokens=rollout.max_response_tokens,
        seed=seed,
    )
    longest = max(int(prompt.prompt_token_ids.size) for prompt in prompts)
    room = max_context - longest
    if room < 1:
        raise ConfigError(
            f"rollout.max_prompt_tokens={rollout.max_prompt_tokens}: a prompt has {longest} tokens, the teacher's "
            f"context is {max_context}; lower it"
        )
    return replace(sampling, max_response_tokens=min(room, sampling.max_response_tokens))


def _identity(settings: ColdStartSettings, prompts: Sequence[TokenizedPrompt]) -> dict[str, Any]:
    """All but the teacher's weights, which cost a load to know."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.prompt_token_ids.tolist(), prompt.template]).encode())
    rollout = settings.rollout
    return {
        "teacher": settings.teacher.model,
        "prompts": digest.hexdigest(),
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "max_response_tokens": rollout.max_response_tokens,
        "seed": settings.seed,
    }


def _dtype(settings: ColdStartSettings) -> str:
    device = settings.teacher.device
    is_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return "bfloat16" if is_cuda else "float32"
