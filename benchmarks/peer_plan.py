"""What both sides of `peer_step` are to do, said once: models, prompts in order, sampling, optimizer, steps."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opd.settings import load_settings
from services.trainer.config import TrainSettings
from testbed.stack import DATA, MODELS

STUDENT, TEACHER = "student-base", "teacher-post"
MAX_PROMPT_TOKENS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Example: ``Plan(prompts_per_step=64, rollouts_per_prompt=4, steps=5, ...)`` trains on 256 rollouts a step."""

    prompts_per_step: int
    rollouts_per_prompt: int
    steps: int
    """Warm-up included."""
    max_response_tokens: int
    cores: int
    micro_batch_tokens: int
    """Of our forward and backward passes."""
    trl_batch: int
    """Rollouts of one of TRL's forward and backward passes."""
    temperature: float = 1.0
    lr: float = 2e-4
    max_grad_norm: float = 1.0
    seed: int = 0
    further: tuple[str, ...] = field(default=())
    """Settings of our trainer that are laid over those here."""

    @property
    def rollouts(self) -> int:
        return self.prompts_per_step * self.rollouts_per_prompt

    def overrides(self, run_dir: Path, url: str, *further: str) -> list[str]:
        """Our trainer's configuration; what is not named here is at its default, metrics and grading included."""
        return [
            f"student.model={json.dumps(str(MODELS / STUDENT))}",
            f"student.max_micro_batch_tokens={self.micro_batch_tokens}",
            # While it samples, the teacher has the other core; while it updates, nobody has.
            f"student.threads={self.cores}",
            f"rollout.threads={max(1, self.cores - 1)}",
            f"teacher.pool={TEACHER}",
            f"teacher.url={json.dumps(url)}",
            f"data.files=[{json.dumps(str(DATA / 'train.jsonl'))}]",
            f"rollout.prompts_per_step={self.prompts_per_step}",
            f"rollout.rollouts_per_prompt={self.rollouts_per_prompt}",
            f"rollout.temperature={self.temperature}",
            f"rollout.max_prompt_tokens={MAX_PROMPT_TOKENS}",
            f"rollout.max_response_tokens={self.max_response_tokens}",
            f"rollout.max_slots={self.rollouts}",
            f"optim.lr={self.lr}",
            "optim.weight_decay=0.0",
            f"optim.max_grad_norm={self.max_grad_norm}",
            "checkpoint.every_steps=0",
            "log.level=warning",
            f"run_dir={json.dumps(str(run_dir))}",
            f"seed={self.seed}",
            f"steps={self.steps}",
            *further,
        ]

    def settings(self, run_dir: Path, url: str, *further: str) -> TrainSettings:
        """The same as our trainer reads it."""
        return load_settings(TrainSettings, None, self.overrides(run_dir, url, *further))

    def write_for_trl(self, path: Path) -> None:
        """Every prompt of every step in the order in which our trainer takes them, as messages and as our token ids."""
        prompts = self._prompts(path.parent)
        content: dict[str, Any] = asdict(self) | {
            "student": str(MODELS / STUDENT),
            "teacher": str(MODELS / TEACHER),
            "folder": str(path.parent / "trl"),
            "rollouts": self.rollouts,
            "prompts": [[dict(message) for message in prompt.problem.messages] for prompt in prompts],
            "prompt_token_ids": [prompt.prompt_token_ids.tolist() for prompt in prompts],
        }
        path.write_text(json.dumps(content), encoding="utf-8")

    def _prompts(self, folder: Path) -> Sequence[Any]:
        from services.trainer.models import load_tokenizer
        from services.trainer.prompt_files import prepare_prompts

        settings = self.settings(folder / "unused", "redis://unused")
        schedule = prepare_prompts(settings, load_tokenizer(settings.student.model)).schedule
        return [
            prompt
            for step in range(self.steps)
            for prompt in schedule.step_prompts(step)
            for _ in range(self.rollouts_per_prompt)
        ]
