"""One fine-tuning run: batches by seed, exact token means, checkpoints, and the loss on held-out examples.

The mean of an optimizer step is over all its response tokens, so that the step does not depend on how rows are split
into micro-batches. What a step trains on is a function of examples, settings and seed alone: a run that was ended goes
on from its last checkpoint as if nothing had happened.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd.errors import CheckpointError, ConfigError, NonFiniteError
from services.trainer.checkpoint import Checkpoint, CheckpointStore, TrainerState
from services.trainer.models import LoadedModel
from services.trainer.recipes.sft.config import SftSettings
from services.trainer.recipes.sft.loss import check_packing, token_losses
from services.trainer.recipes.sft.packing import SftExample, build_packed_batch, pack_rows, row_tokens
from services.trainer.recipes.sft.schedule import cosine_factor
from services.trainer.run_log import RunLog
from services.trainer.student import Student, StudentOptimizer

_MAX_VALIDATION = 256
_NO_MATTER = {
    "max_micro_batch_tokens",
    "row_chunk",
    "gradient_checkpointing",
    "checkpoint_every_steps",
    "log_every_steps",
}
"""Settings that change nothing in what is learnt."""
LOSS = "loss/sft"
VALIDATION_LOSS = "loss/validation"
Rows = list[list[SftExample]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SftPlan:
    """What every step trains on."""

    steps: tuple[Rows, ...]
    validation: tuple[SftExample, ...]
    digest: str
    """Of student, examples, settings and seed: a checkpoint of another plan is not this run's."""

    @property
    def num_rows(self) -> int:
        return sum(len(rows) for rows in self.steps)


def plan_steps(
    examples: Sequence[SftExample], settings: SftSettings, *, student: str, max_tokens: int, seed: int
) -> SftPlan:
    """Shuffles, holds out, packs, for the student with the fingerprint `student`.

    `ConfigError` when nothing is left to train on.
    """
    order = np.random.default_rng([seed, 0]).permutation(len(examples))
    shuffled = [examples[place] for place in order]
    num_held = min(_MAX_VALIDATION, math.ceil(len(examples) * settings.validation_share))
    validation, training = shuffled[:num_held], shuffled[num_held:]
    if not training:
        raise ConfigError(
            f"sft: {len(examples)} examples and validation_share={settings.validation_share} leave none to train on; "
            "loosen the filters or lower it"
        )
    rows_per_step = settings.rows_per_batch * settings.accumulation
    steps: list[Rows] = []
    for epoch in range(settings.num_epochs):
        places = np.random.default_rng([seed, 1, epoch]).permutation(len(training))
        rows = pack_rows([training[place] for place in places], max_tokens, packing=settings.packing)
        steps += [rows[start : start + rows_per_step] for start in range(0, len(rows), rows_per_step)]
    return SftPlan(steps=tuple(steps), validation=tuple(validation), digest=_digest(student, steps, settings, seed))


class SftRun:
    """Trains a student as planned."""

    def __init__(self, loaded: LoadedModel, plan: SftPlan, settings: SftSettings, *, folder: Path, seed: int) -> None:
        """`folder` gets checkpoints, `metrics.jsonl` and `summary.json`."""
        self._loaded = loaded
        self._plan = plan
        self._settings = settings
        self._seed = seed
        self._log = RunLog(folder)
        self._store = CheckpointStore(folder / "checkpoints", keep_last=1)
        self._student = Student(
            loaded.model,
            num_defined_ids=loaded.num_defined_ids,
            row_chunk=settings.row_chunk,
            gradient_checkpointing=settings.gradient_checkpointing,
        )
        if settings.packing:
            check_packing(self._student)
        num_steps, warmup_share = len(plan.steps), settings.optim.warmup_share
        self._optimizer = StudentOptimizer(
            loaded.model,
            settings.optim.as_optim(),
            lr_factor=lambda step: cosine_factor(step, num_steps, warmup_share),
        )

    def train(self, checkpoint: Checkpoint | None, on_step: Callable[[int, dict[str, float]], None]) -> dict[str, Any]:
        """All steps that are left after `checkpoint`, of which the weights are loaded already; returns the summary."""
        first_step = 0
        if checkpoint is None:
            self._log.create(self._settings.model_dump(mode="json"))
            self._log.drop_after(-1)
            self._log.write_step(0, self._validation(), {})
        else:
            first_step = checkpoint.state.step
            self._optimizer.load_state_tensors(checkpoint.optimizer_tensors())
            self._log.drop_after(first_step)
        for step in range(first_step, len(self._plan.steps)):
            metrics = self._train_step(step)
            done = step + 1
            if done == len(self._plan.steps):
                metrics |= self._validation()
            self._log.write_step(done, metrics, {})
            on_step(done, metrics)
            if done % self._settings.checkpoint_every_steps == 0 and done < len(self._plan.steps):
                self._save(done)
        summary = self._summary()
        self._log.write_summary(summary)
        return summary

    def _train_step(self, step: int) -> dict[str, float]:
        rows = self._plan.steps[step]
        num_targets = sum(len(example.response_token_ids) for row in rows for example in row)
        self._optimizer.zero_grad()
        loss = 0.0
        for part in split_rows(rows, self._settings.max_micro_batch_tokens):
            share = token_losses(self._student, build_packed_batch(part, self._student.device)).sum() / num_targets
            share.backward()
            loss += share.item()
        grad_norm = self._optimizer.clip()
        if not math.isfinite(grad_norm):
            raise NonFiniteError(f"sft step {step + 1}: the gradient's norm is {grad_norm}; lower sft.optim.lr")
        lr = self._optimizer.step(step)
        num_tokens = sum(row_tokens(row) for row in rows)
        fill = num_tokens / (len(rows) * max(row_tokens(row) for row in rows))
        return {
            LOSS: loss,
            "optim/grad_norm": grad_norm,
            "optim/lr": lr,
            "data/response_tokens": float(num_targets),
            "data/examples": float(sum(len(row) for row in rows)),
            "data/fill": fill,
        }

    def _validation(self) -> dict[str, float]:
        """Token mean over the held-out examples; empty when none was held out."""
        if not self._plan.validation:
            return {}
        rows = [[example] for example in sorted(self._plan.validation, key=lambda example: -example.num_tokens)]
        total, count = 0.0, 0
        with torch.no_grad():
            for part in split_rows(rows, self._settings.max_micro_batch_tokens):
                losses_T = token_losses(self._student, build_packed_batch(part, self._student.device))
                total += losses_T.double().sum().item()
                count += losses_T.numel()
        return {VALIDATION_LOSS: total / count}

    def _save(self, step: int) -> None:
        state = TrainerState(step=step, seed=self._seed, prompts_digest=self._plan.digest, config={})
        self._store.save(self._loaded.model, self._loaded.tokenizer, self._optimizer.state_tensors(), state)

    def _summary(self) -> dict[str, Any]:
        records = self._log.steps()
        validation = [record[VALIDATION_LOSS] for record in records if VALIDATION_LOSS in record]
        losses = [record[LOSS] for record in records if LOSS in record]
        return {
            "digest": self._plan.digest,
            "steps": len(self._plan.steps),
            "rows": self._plan.num_rows,
            "examples": int(sum(record.get("data/examples", 0) for record in records)),
            "response_tokens": int(sum(record.get("data/response_tokens", 0) for record in records)),
            "validation_examples": len(self._plan.validation),
            "validation_loss_before": validation[0] if validation else None,
            "validation_loss_after": validation[-1] if validation else None,
            "first_step_loss": losses[0],
            "last_step_loss": losses[-1],
        }


def starting_point(folder: Path, plan: SftPlan) -> Checkpoint | None:
    """The checkpoint to go on from; `CheckpointError` when the folder belongs to another plan."""
    checkpoint = CheckpointStore(folder / "checkpoints", keep_last=1).latest()
    if checkpoint is not None and checkpoint.state.prompts_digest != plan.digest:
        raise CheckpointError(
            f"{folder}: holds a run of another student, examples or settings; remove that folder or use another run_dir"
        )
    return checkpoint


def split_rows(rows: Sequence[list[SftExample]], max_tokens: int) -> list[Rows]:
    """Micro-batches of at most `max_tokens` tokens after padding, longest rows first; a longer row stands alone."""
    parts: list[Rows] = []
    longest = 0
    for row in sorted(rows, key=row_tokens, reverse=True):
        if not parts or (len(parts[-1]) + 1) * longest > max_tokens:
            parts.append([])
            longest = row_tokens(row)
        parts[-1].append(row)
    return parts


def _digest(student: str, steps: Sequence[Rows], settings: SftSettings, seed: int) -> str:
    fixed = settings.model_dump_json(exclude=_NO_MATTER)
    digest = hashlib.sha256(f"{student} {seed} {fixed}".encode())
    for rows in steps:
        for row in rows:
            for example in row:
                digest.update(repr((example.prompt_token_ids, example.response_token_ids)).encode())
    return digest.hexdigest()[:32]
