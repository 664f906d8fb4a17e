"""Models and problem sets as the commands of this folder name them: by folder, file or hub name."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from opd.errors import ConfigError
from services.trainer.evaluation.sampling import EvaluatedModel
from services.trainer.models import LoadedModel, load_model
from services.trainer.prompts import PromptProblem, PromptView, TokenizedPrompt, load_problems, tokenize_problems
from services.trainer.rollout.transformers_engine import TransformersEngine


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """How models are loaded and prompts are put to them."""

    device: str = "auto"
    dtype: str = "auto"
    """`auto` is bfloat16 on CUDA and float32 elsewhere."""
    max_slots: int = 256
    """Responses sampled at a time."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedModel:
    """A model in memory, ready to be asked."""

    loaded: LoadedModel
    evaluated: EvaluatedModel
    view: PromptView

    def tokenize(self, problems: Sequence[PromptProblem]) -> list[TokenizedPrompt]:
        """Every problem: a prompt that does not fit the context is reported by whoever samples, not left out."""
        return tokenize_problems(problems, self.view, max_prompt_tokens=2**31)


def open_model(path: str, loading: Loading, *, label: str = "") -> OpenedModel:
    """Loads a folder or hub name; `ConfigError` in one line where that cannot be."""
    transformers_logging.disable_progress_bar()
    loaded = load_model(path, device=loading.device, dtype=_dtype(loading))
    engine = TransformersEngine(
        loaded.model,
        eos_token_ids=loaded.eos_token_ids,
        num_defined_ids=loaded.num_defined_ids,
        score_top_k=None,
        max_slots=loading.max_slots,
    )
    evaluated = EvaluatedModel(
        name=label or loaded.name,
        fingerprint=loaded.fingerprint,
        engine=engine,
        decode=lambda token_ids: loaded.tokenizer.decode(token_ids, skip_special_tokens=True),
    )
    view = PromptView(tokenizer=loaded.tokenizer, chat_template_kwargs=loading.chat_template_kwargs)
    return OpenedModel(loaded=loaded, evaluated=evaluated, view=view)


def open_problems(
    data: Sequence[str], *, template: str | None, split: str, max_problems: int | None
) -> dict[str, list[PromptProblem]]:
    """The problems of every set, by label."""
    if max_problems is not None and max_problems < 1:
        raise ConfigError(f"max_problems: {max_problems} is too small; give 1 or more")
    names = list(dict.fromkeys(data))
    return {
        label: load_problems(name, template=template, split=split)[:max_problems]
        for name, label in zip(names, labels(names), strict=True)
    }


def labels(names: Sequence[str]) -> list[str]:
    """What people see of paths and hub names: a path's last part where that tells it apart, else all of it."""
    short = [_short(name) for name in names]
    return [
        shown if short.count(shown) == 1 else os.path.normpath(name) for name, shown in zip(names, short, strict=True)
    ]


def _short(name: str) -> str:
    path = Path(name)
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.is_file() else name


def _dtype(loading: Loading) -> str:
    if loading.dtype != "auto":
        return loading.dtype
    device = loading.device
    is_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return "bfloat16" if is_cuda else "float32"
