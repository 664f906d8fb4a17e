"""Model cards: what a model is, how it was made and what was measured on it.

``card.json`` holds everything, ``README.md`` says the same for people. Measurements load the saved folder, so they are
about the weights that are shipped, after rounding to the stored dtype. The card is the last file of a stage.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from services.trainer.rollout.base import SamplingParams
from testbed.architecture import count_parameters, load_model
from testbed.datasets import FILES, Item, draw_items_of
from testbed.demonstrations import TEMPLATE_NAMES, Recipe
from testbed.family import Measuring
from testbed.measuring import (
    EVALUATION_SAMPLING,
    TRAINING_SAMPLING,
    Summary,
    grade_samples,
    summarize,
)
from testbed.tokenizer import load_tokenizer

CARD_FILE = "card.json"
README_FILE = "README.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How a model was made; rounds holds, per expert iteration round, accuracy seen and responses kept by level."""

    seed: int
    purpose: str
    origin: str
    recipe: Recipe | None
    updates: int
    seen_tokens: int
    trained_tokens: int
    seconds: float
    held_out_losses: list[tuple[int, float]]
    rounds: list[dict[str, object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the saved model does: at training sampling, at evaluation sampling, and on long problems."""

    parameters: int
    weight_bytes: int
    training_sampling: Summary
    evaluation_sampling: Summary
    long: Summary


def measure(folder: Path, measuring: Measuring, seed: int) -> Measured:
    """Sample the saved model on held-out problems."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    items, long_items = (draw_items_of(file, seed) for file in (FILES[1], FILES[3]))

    def summary(chosen: list[Item], sampling: SamplingParams, max_tokens: int, samples_each: int) -> Summary:
        limited = replace(sampling, max_response_tokens=max_tokens, seed=seed)
        return summarize(grade_samples(model, tokenizer, chosen, TEMPLATE_NAMES, limited, samples_each))

    chosen, chosen_long = items[: measuring.problems], long_items[: measuring.long_problems]
    max_tokens, samples_each = measuring.max_response_tokens, measuring.samples_each
    return Measured(
        parameters=count_parameters(model),
        weight_bytes=(folder / "model.safetensors").stat().st_size,
        training_sampling=summary(chosen, TRAINING_SAMPLING, max_tokens, samples_each),
        evaluation_sampling=summary(chosen, EVALUATION_SAMPLING, max_tokens, samples_each),
        long=summary(chosen_long, TRAINING_SAMPLING, measuring.max_long_tokens, measuring.long_samples_each),
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _row(name: str, values: list[str]) -> str:
    return "| " + " | ".join([name, *values]) + " |"


def _table(measured: Measured) -> list[str]:
    summaries = (measured.training_sampling, measured.evaluation_sampling, measured.long)
    levels = sorted({level for summary in summaries[:2] for level in summary.accuracy_by_level})
    by_level = [
        _row(f"accuracy, level {level}", [_percent(one.accuracy_by_level.get(level)) for one in summaries])
        for level in levels
    ]
    styles = [", ".join(f"{name} {_percent(share)}" for name, share in one.style_shares.items()) for one in summaries]
    return [
        _row("", ["T 1.0, top-p 1.0", "T 0.7, top-p 0.95", "long, T 1.0"]),
        "|---|---|---|---|",
        _row("samples", [str(one.num_samples) for one in summaries]),
        _row("accuracy", [_percent(one.accuracy) for one in summaries]),
        *by_level,
        _row("forgotten carries", [_percent(one.forgotten_carry_rate) for one in summaries]),
        _row("style", styles),
        _row("entropy, nats per token", [f"{one.mean_entropy_nats:.3f}" for one in summaries]),
        _row("most live tokens (p > 0.01)", [str(one.max_live_tokens) for one in summaries]),
        _row("positions with 8 or more", [_percent(one.wide_fork_share) for one in summaries]),
        _row("response tokens", [f"{one.mean_response_tokens:.1f}" for one in summaries]),
        _row("truncated", [_percent(one.truncated_share) for one in summaries]),
    ]


def _readme(name: str, training: Training, measured: Measured) -> str:
    losses = ", ".join(f"{update}: {loss:.4f}" for update, loss in training.held_out_losses[-5:])
    lines = [
        f"# {name}",
        "",
        f"Part of the testbed's model family: {training.purpose}.",
        "",
        f"- Origin: {training.origin}; seed {training.seed}.",
        f"- {measured.parameters:,} parameters, {measured.weight_bytes:,} bytes of weights.",
        f"- {training.updates:,} updates on {training.trained_tokens:,} response tokens "
        f"({training.seen_tokens:,} tokens with prompts and padding), {training.seconds:,.0f} seconds.",
        *([f"- Loss on held-out demonstrations at the last checkpoints (update: nats): {losses}."] if losses else []),
        "",
        "Measured on held-out problems: levels 1-4 in both prompt templates equally, long problems in `dapo` alone:",
        "",
        *_table(measured),
        "",
        "Built by `python -m testbed.build`; all numbers are in `card.json`.",
    ]
    return "\n".join(lines) + "\n"


def write_card(folder: Path, name: str, training: Training, measured: Measured) -> None:
    """Write the README, then the card, which marks the model as finished."""
    (folder / README_FILE).write_text(_readme(name, training, measured), encoding="utf-8")
    card: dict[str, Any] = {"name": name, **asdict(training), "measured": asdict(measured)}
    (folder / CARD_FILE).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
