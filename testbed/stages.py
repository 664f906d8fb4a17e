"""The stages of a build: tokenizer, problem files, one stage per model; each is skipped once it is finished.

A model stage is finished when its card exists, which is written last. Before that it goes on from the checkpoints in
the work folder. teacher-post needs the finished student-base of the same models folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from testbed import expert
from testbed.architecture import create_model, load_model, save_model
from testbed.batches import (
    NUM_SOLUTIONS,
    Batch,
    Example,
    cut,
    demonstration_batches,
    encode_demonstrations,
    epoch,
)
from testbed.cards import CARD_FILE, Training, measure, write_card
from testbed.demonstrations import IMPERFECT, Recipe, demonstrations, grouped_demonstrations
from testbed.family import BASE_NAME, POST_NAME, POST_PURPOSE, Member, Scale
from testbed.problems import Split
from testbed.tokenizer import fragments_of, load_tokenizer, train_tokenizer
from testbed.training import Progress, Schedule, train

Report = Callable[[str, int, int, float], None]
"""Told about progress: stage, update, updates, loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """One build: where it reads and writes, its seed and its scale."""

    work: Path
    models: Path
    seed: int
    scale: Scale
    report: Report

    def is_finished(self, name: str) -> bool:
        """Whether the model's card exists; a card of another seed means that the folder belongs to another build."""
        card = self.models / name / CARD_FILE
        if not card.exists():
            return False
        seed = json.loads(card.read_text(encoding="utf-8"))["seed"]
        if seed != self.seed:
            raise ValueError(f"{card} was built with seed {seed}, not {self.seed}; choose another models folder")
        return True


def tokenizer_stage(build: Build) -> PreTrainedTokenizerFast:
    """Train the tokenizer once, on demonstrations without tags in both styles."""
    folder = build.work / "tokenizer"
    if not (folder / "tokenizer_config.json").exists():
        count = build.scale.tokenizer_demonstrations
        recipes = (Recipe(tag_share=0.0), Recipe(tag_share=0.0, rounding_share=0.5))
        drawn = (islice(demonstrations(f"{build.seed}/tokenizer", recipe), count) for recipe in recipes)
        train_tokenizer(f"{demo.prompt}\n{demo.response}" for part in drawn for demo in part).save_pretrained(folder)
    return load_tokenizer(folder)


def held_out_batches(build: Build, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, max_tokens: int) -> list[Batch]:
    """Fixed batches of held-out demonstrations, the measure of a plateau."""
    fragments = fragments_of(tokenizer)
    groups = grouped_demonstrations("held-out loss", recipe, Split.HELD_OUT, fragments, NUM_SOLUTIONS)
    examples = encode_demonstrations(tokenizer, islice(groups, build.scale.held_out_problems))
    return list(epoch(examples, tokenizer.pad_token_id, max_tokens, "held-out loss"))


def _reporter(build: Build, stage: str, updates: int) -> Callable[[Progress], None]:
    return lambda progress: build.report(stage, progress.update, updates, progress.losses[-1][1])


def member_stage(build: Build, member: Member) -> None:
    """Train a model on demonstrations, save it and measure its card."""
    if build.is_finished(member.name):
        return
    tokenizer = tokenizer_stage(build)
    model = create_model(member.size, tokenizer, 100 * build.seed + member.number)
    max_tokens = member.schedule.max_tokens
    progress = train(
        model,
        member.schedule,
        partial(demonstration_batches, tokenizer, member.recipe, f"{build.seed}/{member.name}", max_tokens),
        build.work / member.name,
        held_out_batches(build, tokenizer, member.recipe, max_tokens),
        _reporter(build, member.name, member.schedule.updates),
    )
    folder = build.models / member.name
    save_model(model, tokenizer, folder, member.size.dtype)
    training = Training(
        seed=build.seed,
        purpose=member.purpose,
        origin="from scratch on demonstrations",
        recipe=member.recipe,
        updates=progress.update,
        seen_tokens=progress.seen_tokens,
        trained_tokens=progress.trained_tokens,
        seconds=progress.seconds,
        held_out_losses=progress.held_out_losses,
        rounds=[],
    )
    write_card(folder, member.name, training, measure(folder, build.scale.measuring, build.seed))


def _round_schedule(build: Build, examples: list[Example]) -> Schedule:
    rounds = build.scale.rounds
    updates = rounds.epochs * len(cut(examples, rounds.max_tokens))
    return Schedule(
        updates=updates,
        learning_rate=rounds.learning_rate,
        warmup=min(20, max(1, updates // 4)),
        max_tokens=rounds.max_tokens,
        checkpoint_every=100,
    )


def _round(
    build: Build, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, number: int
) -> tuple[Progress, dict[str, object]]:
    """One round of expert iteration in place; a round that kept nothing changes nothing."""
    rounds, stage = build.scale.rounds, f"{POST_NAME} round {number}"
    folder, seed = build.work / POST_NAME / f"round-{number}", f"{build.seed}/{POST_NAME}/{number}"
    kept_file, seen_file = folder / "kept.jsonl", folder / "accuracy.json"
    if not kept_file.exists():
        kept, accuracy = expert.collect(model, tokenizer, rounds, seed)
        folder.mkdir(parents=True, exist_ok=True)
        seen_file.write_text(json.dumps(accuracy), encoding="utf-8")
        expert.write_kept(kept_file, kept)
    kept = expert.read_kept(kept_file)
    seen = {"accuracy": json.loads(seen_file.read_text(encoding="utf-8")), "kept": expert.level_counts(kept)}
    if not kept:
        return Progress(), seen
    examples = expert.encode_kept(tokenizer, kept)
    schedule = _round_schedule(build, examples)
    batches = partial(expert.kept_batches, examples, tokenizer.pad_token_id, rounds.max_tokens, seed)
    correct = Recipe(forget_rate=0.0, rounding_share=IMPERFECT.rounding_share)
    held_out = held_out_batches(build, tokenizer, correct, rounds.max_tokens)
    return train(model, schedule, batches, folder, held_out, _reporter(build, stage, schedule.updates)), seen


def post_stage(build: Build) -> None:
    """Post-train student-base by expert iteration."""
    if build.is_finished(POST_NAME):
        return
    if not build.is_finished(BASE_NAME):
        raise ValueError(f"{POST_NAME} starts from {BASE_NAME}, which {build.models} does not hold: build it first")
    base = build.models / BASE_NAME
    tokenizer, model = load_tokenizer(base), load_model(base)
    done = [_round(build, model, tokenizer, number) for number in range(1, build.scale.rounds.rounds + 1)]
    folder = build.models / POST_NAME
    save_model(model, tokenizer, folder, torch.float32)
    training = Training(
        seed=build.seed,
        purpose=POST_PURPOSE,
        origin=f"{BASE_NAME}, by expert iteration on its own verified samples",
        recipe=None,
        updates=sum(progress.update for progress, _ in done),
        seen_tokens=sum(progress.seen_tokens for progress, _ in done),
        trained_tokens=sum(progress.trained_tokens for progress, _ in done),
        seconds=sum(progress.seconds for progress, _ in done),
        held_out_losses=[],
        rounds=[seen for _, seen in done],
    )
    write_card(folder, POST_NAME, training, measure(folder, build.scale.measuring, build.seed))


def run_stages(build: Build, only: str | None) -> None:
    """Run all model stages, or the one named."""
    stages: dict[str, Callable[[], None]] = {
        member.name: partial(member_stage, build, member) for member in build.scale.members
    }
    stages[POST_NAME] = partial(post_stage, build)
    if only is not None and only not in stages:
        raise ValueError(f"no model named {only!r}; choose one of {', '.join(stages)}")
    for name, stage in stages.items():
        if only in (None, name):
            stage()
