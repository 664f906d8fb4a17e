"""The three stages of a cold start in one folder: rollouts, filter, fine-tuning.

Each leaves files; the same command again takes up what is there. Rollouts are kept line by line, filters are cheap and
always run anew, fine-tuning goes on from its last checkpoint and a finished one is not repeated.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from opd.errors import CheckpointError, ConfigError
from services.trainer.checkpoint import Checkpoint
from services.trainer.models import LoadedModel, load_model, require_savable
from services.trainer.recipes.cold_start.config import ColdStartSettings
from services.trainer.recipes.cold_start.prompt_split import PromptSplit, split_prompts
from services.trainer.recipes.cold_start.rollout_file import TeacherRollout
from services.trainer.recipes.cold_start.sampling import TeacherPrompts, sample_teacher, teacher_prompts
from services.trainer.recipes.cold_start.selection import Selection, select
from services.trainer.recipes.data.writing import check_json, write_rows
from services.trainer.recipes.sft.curve import draw_loss_curve
from services.trainer.recipes.sft.training import LOSS, SftPlan, SftRun, plan_steps, starting_point
from services.trainer.run_log import SUMMARY_FILE, read_steps

REMAINING_FILE = "remaining.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
KEPT_FILE = "kept.jsonl"
DROPPED_FILE = "dropped.jsonl"
SFT_FOLDER = "sft"
MODEL_FOLDER = "model"
CURVE_FILE = "sft_loss.png"
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class Stage(StrEnum):
    """In order."""

    ROLLOUTS = "rollouts"
    FILTER = "filter"
    SFT = "sft"


@dataclass(frozen=True, kw_only=True, slots=True)
class ColdStartResult:
    """What the card accounts for; a stage that was not reached is None."""

    split: PromptSplit
    asked: TeacherPrompts
    rollouts: tuple[TeacherRollout, ...]
    selection: Selection | None = None
    sft: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Training:
    """What the last stage starts from, known to be of this `run_dir`."""

    plan: SftPlan
    student: LoadedModel
    """As the checkpoint has it, where there is one."""
    checkpoint: Checkpoint | None
    finished: dict[str, Any] | None
    """The summary, where nothing is left to do."""


def run_stages(
    settings: ColdStartSettings, progress: Progress, say: Callable[[str], None], *, until: Stage
) -> ColdStartResult:
    """Runs what is missing, up to and with `until`. Raises `ConfigError` and the errors of training."""
    run_dir = settings.run_dir
    # The student is not needed before the last stage, but better known to be unusable now.
    max_tokens = _row_tokens(settings)
    split = split_prompts(settings.data, settings.seed)
    check_json(split.remaining, f"data.files: {REMAINING_FILE}", "leave that column out of the file")
    asked = teacher_prompts(settings, split.cold_start)
    total = len(asked.prompts) * settings.rollout.rollouts_per_prompt
    with progress("teacher rollouts", total) as advance:
        rollouts = tuple(sample_teacher(settings, asked.prompts, run_dir / ROLLOUTS_FILE, advance))
    # Only now: rollouts of other prompts have been refused, and their remaining ones stay as they were.
    write_rows(run_dir / REMAINING_FILE, split.remaining)
    result = ColdStartResult(split=split, asked=asked, rollouts=rollouts)
    if until is Stage.ROLLOUTS:
        return result
    selection = select(settings, asked.prompts, rollouts, max_tokens=max_tokens)
    training = None if until is Stage.FILTER else _prepare_training(settings, selection, max_tokens)
    _write_selection(run_dir, selection)
    say(f"{len(selection.kept)} of {len(rollouts)} responses are kept")
    summary = None if training is None else _fine_tune(settings, selection, training, progress, say)
    return ColdStartResult(split=split, asked=asked, rollouts=rollouts, selection=selection, sft=summary)


def _row_tokens(settings: ColdStartSettings) -> int:
    """`sft.sequence_tokens`, bounded by the student's context."""
    name = settings.student.model
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # The library raises many kinds for a missing or broken configuration.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ConfigError(
            f"student.model={name}: cannot be read ({reason}); give a Hugging Face folder or a hub name"
        ) from error
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(settings.sft.sequence_tokens, context or settings.sft.sequence_tokens)


def _write_selection(run_dir: Path, selection: Selection) -> None:
    kept = zip(selection.kept, selection.examples, strict=True)
    write_rows(
        run_dir / KEPT_FILE,
        [
            asdict(rollout) | {"prompt_token_ids": example.prompt_token_ids, "token_ids": example.response_token_ids}
            for rollout, example in kept
        ],
    )
    write_rows(
        run_dir / DROPPED_FILE, [{"reason": str(reason)} | asdict(rollout) for rollout, reason in selection.dropped]
    )


def _prepare_training(settings: ColdStartSettings, selection: Selection, max_tokens: int) -> _Training:
    """Raises before anything of another plan in `run_dir` is written over."""
    run_dir = settings.run_dir
    if not selection.examples:
        # Beside a model or its checkpoints stays what they were made from.
        if not (run_dir / SFT_FOLDER).exists():
            _write_selection(run_dir, selection)
        counts = Counter(str(reason) for reason, _ in selection.dropped)
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
        raise ConfigError(
            f"filters: no response is left to train on ({reasons}); loosen them or raise data.num_prompts"
        )
    loaded = load_model(settings.student.model, device=settings.student.device)
    require_savable(loaded)
    plan = plan_steps(
        selection.examples, settings.sft, student=loaded.fingerprint, max_tokens=max_tokens, seed=settings.seed
    )
    finished = _finished(run_dir, plan)
    checkpoint = None if finished is not None else starting_point(run_dir / SFT_FOLDER, plan)
    if checkpoint is not None:
        loaded = load_model(str(checkpoint.folder), device=settings.student.device)
    return _Training(plan=plan, student=loaded, checkpoint=checkpoint, finished=finished)


def _fine_tune(
    settings: ColdStartSettings,
    selection: Selection,
    training: _Training,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    if training.finished is not None:
        say("the fine-tuning is finished already")
        return training.finished
    folder = settings.run_dir / SFT_FOLDER
    plan, loaded, checkpoint = training.plan, training.student, training.checkpoint
    run = SftRun(loaded, plan, settings.sft, folder=folder, seed=settings.seed)
    with progress("fine-tuning", len(plan.steps)) as advance:
        advance(checkpoint.state.step if checkpoint else 0)

        def on_step(step: int, metrics: dict[str, float]) -> None:
            advance(1)
            if step % settings.sft.log_every_steps == 0 or step == len(plan.steps):
                say(f"sft step {step}/{len(plan.steps)}  loss {metrics[LOSS]:.4f}  lr {metrics['optim/lr']:.2e}")

        summary = run.train(checkpoint, on_step)
    draw_loss_curve(read_steps(folder), settings.run_dir / CURVE_FILE)
    save_model(loaded, selection, settings.run_dir / MODEL_FOLDER)
    # Only a checkpoint's weights are in it that the model folder has too.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return summary


def _finished(run_dir: Path, plan: SftPlan) -> dict[str, Any] | None:
    """The summary of a run that came to its end and left its model; `CheckpointError` when of another plan."""
    path = run_dir / SFT_FOLDER / SUMMARY_FILE
    if not path.is_file() or not (run_dir / MODEL_FOLDER).is_dir():
        return None
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if summary.get("digest") != plan.digest:
        raise CheckpointError(
            f"{run_dir}: its model was made from another student, examples or settings; remove its folders "
            f"{SFT_FOLDER} and {MODEL_FOLDER}, or use another run_dir"
        )
    return summary


def save_model(loaded: LoadedModel, selection: Selection, folder: Path) -> None:
    """A folder that `opd train student.model=` takes; whole once it has its name."""
    # A response may end as the teacher's do: whoever samples this student has to know that it then has ended.
    ends = {example.response_token_ids[-1] for example in selection.examples}
    loaded.model.generation_config.eos_token_id = sorted(ends | set(loaded.eos_token_ids))
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        loaded.model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}); free space there") from error
