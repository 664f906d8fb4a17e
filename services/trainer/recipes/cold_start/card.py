"""The card of a cold start: what happened to every prompt and response, and what the fine-tuning did."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.trainer.evaluation.grading import is_equal
from services.trainer.recipes.cold_start.config import ColdStartSettings
from services.trainer.recipes.cold_start.filters import DropReason
from services.trainer.recipes.cold_start.stages import CURVE_FILE, REMAINING_FILE, ColdStartResult
from services.trainer.templates import get_template


def build_card(settings: ColdStartSettings, result: ColdStartResult) -> dict[str, Any]:
    """As JSON. No time and no machine in it."""
    split, selection = result.split, result.selection
    card: dict[str, Any] = {
        "teacher": settings.teacher.model,
        "student": settings.student.model,
        "prompts": {
            "rows": split.num_rows,
            "cold_start": len(split.cold_start),
            "remaining": len(split.remaining),
            "duplicates_of_cold_start": split.num_duplicates,
            "too_long_for_teacher": result.asked.num_overlong,
            "remaining_sha256": _file_hash(settings.run_dir / REMAINING_FILE),
        },
        "rollouts": {
            "responses": len(result.rollouts),
            "tokens": sum(len(rollout.token_ids) for rollout in result.rollouts),
        },
    }
    if selection is not None:
        card["filters"] = {
            "kept": len(selection.kept),
            "dropped": _reasons(result),
            "kept_tokens": sum(len(rollout.token_ids) for rollout in selection.kept),
            "kept_correct": _num_correct(result),
            "shares_vocabulary": selection.shares_vocabulary,
        }
    if result.sft is not None:
        card["sft"] = result.sft
    return card | {"settings": settings.model_dump(mode="json")}


def as_markdown(card: Mapping[str, Any]) -> str:
    """The card for people."""
    prompts, rollouts = card["prompts"], card["rollouts"]
    lines = [
        "# Cold start",
        "",
        f"Student {card['student']}, taught by {card['teacher']}.",
        "",
        "| | number |",
        "|---|---|",
        f"| rows read | {prompts['rows']} |",
        f"| prompts for the cold start | {prompts['cold_start']} |",
        f"| too long for the teacher | {prompts['too_long_for_teacher']} |",
        f"| prompts left for distillation ({REMAINING_FILE}) | {prompts['remaining']} |",
        f"| rows with a question of the cold start, in neither | {prompts['duplicates_of_cold_start']} |",
        f"| teacher responses | {rollouts['responses']} ({rollouts['tokens']} tokens) |",
    ]
    if "filters" in card:
        filters = card["filters"]
        lines += [f"| dropped: {reason} | {count} |" for reason, count in filters["dropped"].items()]
        lines += [f"| kept | {filters['kept']} ({filters['kept_tokens']} tokens) |"]
        if filters["kept_correct"] is not None:
            lines += [f"| kept with the right answer | {filters['kept_correct']} |"]
    if "sft" in card:
        lines += _sft_lines(card["sft"])
    return "\n".join(lines) + "\n"


def _sft_lines(sft: Mapping[str, Any]) -> list[str]:
    lines = [
        f"| optimizer steps | {sft['steps']} ({sft['rows']} rows, {sft['response_tokens']} response tokens) |",
        f"| loss of the first and last step | {sft['first_step_loss']:.4f}, {sft['last_step_loss']:.4f} |",
    ]
    if sft["validation_loss_before"] is not None:
        lines += [
            f"| loss on {sft['validation_examples']} held-out examples before and after | "
            f"{sft['validation_loss_before']:.4f}, {sft['validation_loss_after']:.4f} |"
        ]
    return [*lines, "", f"![loss]({CURVE_FILE})"]


def _reasons(result: ColdStartResult) -> dict[str, int]:
    """Every reason, also those that dropped nothing."""
    assert result.selection is not None
    counts = Counter(reason for _, reason in result.selection.dropped)
    return {str(reason): counts[reason] for reason in DropReason}


def _num_correct(result: ColdStartResult) -> int | None:
    """Of the kept responses; None when an answer or a template is not known."""
    assert result.selection is not None
    num_correct = 0
    for rollout in result.selection.kept:
        prompt = result.asked.prompts[rollout.prompt]
        if prompt.answer is None or not prompt.template:
            return None
        extracted = get_template(prompt.template).extract(rollout.text)
        num_correct += extracted is not None and is_equal(extracted, prompt.answer)
    return num_correct


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
