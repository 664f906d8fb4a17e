"""The stages a row goes through: each takes candidates in order and returns who stays, and who does not and why."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opd.errors import ConfigError
from services.trainer.prompts import PromptView
from services.trainer.recipes.data.candidates import Candidate, Drop, DropReason
from services.trainer.recipes.data.config import MixSettings, SourceSettings
from services.trainer.recipes.data.embeddings import Embedder
from services.trainer.recipes.data.nearest import Duplicate, find_duplicates

Advance = Callable[[int], None]
Outcome = tuple[list[Candidate], list[Drop]]


def drop_exact(candidates: Sequence[Candidate], against: Sequence[Candidate]) -> Outcome:
    """The first of each question stays, unless `against` has it (stage 1 of C.3)."""
    known = _first_of_each(against)
    seen: dict[str, Candidate] = {}
    kept: list[Candidate] = []
    drops: list[Drop] = []
    for candidate in candidates:
        question = candidate.question
        if question in known:
            drops.append(Drop(candidate=candidate, reason=DropReason.EXACT_AGAINST, partner=known[question]))
        elif question in seen:
            drops.append(Drop(candidate=candidate, reason=DropReason.EXACT_WITHIN, partner=seen[question]))
        else:
            seen[question] = candidate
            kept.append(candidate)
    return kept, drops


def drop_near(
    candidates: Sequence[Candidate],
    against: Sequence[Candidate],
    embedder: Embedder,
    *,
    threshold: float,
    within: bool,
    advance: Advance,
) -> Outcome:
    """Near-duplicates by cosine (stage 2 of C.3). `advance` counts every question twice: embedded, and compared."""
    others = list(_first_of_each(against).values())
    vectors, known = embedder.embed(
        [[candidate.question for candidate in candidates], [other.question for other in others]], advance
    )
    outside, inside = find_duplicates(
        vectors, known if others else None, threshold=threshold, within=within, advance=advance
    )
    advance(len(others))

    def drop(duplicate: Duplicate, reason: DropReason, partners: Sequence[Candidate]) -> Drop:
        return Drop(
            candidate=candidates[duplicate.row],
            reason=reason,
            partner=partners[duplicate.partner],
            similarity=duplicate.similarity,
        )

    drops = {duplicate.row: drop(duplicate, DropReason.SEMANTIC_AGAINST, others) for duplicate in outside}
    drops |= {duplicate.row: drop(duplicate, DropReason.SEMANTIC_WITHIN, candidates) for duplicate in inside}
    kept = [candidate for row, candidate in enumerate(candidates) if row not in drops]
    return kept, [drops[row] for row in sorted(drops)]


def drop_long(candidates: Sequence[Candidate], tokenizer: Any, max_prompt_tokens: int, advance: Advance) -> Outcome:
    """Prompts above the limit, counted as a run counts them: through the tokenizer's chat template."""
    view = PromptView(tokenizer=tokenizer)
    kept: list[Candidate] = []
    drops: list[Drop] = []
    for candidate in candidates:
        num_tokens = int(view.encode(candidate.problem).size)
        if num_tokens > max_prompt_tokens:
            drops.append(Drop(candidate=candidate, reason=DropReason.TOO_LONG, num_tokens=num_tokens))
        else:
            kept.append(candidate)
        advance(1)
    return kept, drops


def draw_mix(
    candidates: Sequence[Candidate], sources: dict[str, SourceSettings], settings: MixSettings, seed: int
) -> Outcome:
    """Rows by the sources' weights, each at most once, in an order that depends on seed and rows alone."""
    pools: dict[str, list[int]] = {name: [] for name in sources}
    for row, candidate in enumerate(candidates):
        pools[candidate.source].append(row)
    counts = mix_counts(
        {name: len(rows) for name, rows in pools.items()},
        {name: source.weight for name, source in sources.items()},
        settings.num_rows,
    )
    generator = np.random.default_rng(seed)
    drawn = [
        pools[name][place]
        for name, count in counts.items()
        for place in generator.permutation(len(pools[name]))[:count]
    ]
    order = [drawn[place] for place in generator.permutation(len(drawn))]
    left = sorted(set(range(len(candidates))) - set(order))
    drops = [Drop(candidate=candidates[row], reason=DropReason.NOT_DRAWN) for row in left]
    return [candidates[row] for row in order], drops


def _first_of_each(candidates: Sequence[Candidate]) -> dict[str, Candidate]:
    """By question, in order."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.question, candidate)
    return found


def mix_counts(available: dict[str, int], weights: dict[str, float], num_rows: int | None) -> dict[str, int]:
    """Rows of each source; `ConfigError` when a source has too few for its share of `num_rows`.

    Unset, the total is the largest at which every source has its share. Rounding goes to the largest remainders.
    """
    total_weight = sum(weights.values())
    shares = {name: weight / total_weight for name, weight in weights.items() if weight}
    empty = [name for name in shares if not available[name]]
    if empty:
        raise ConfigError(f"sources.{empty[0]}: has a weight and no row is left of it; set its weight to 0")
    # A hair is added before rounding down, since 3 / (1 / 3) need not be 9.
    total = num_rows or int(min(available[name] / share for name, share in shares.items()) + 1e-6)
    counts = {name: int(total * share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - total * shares[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if count > available[name]:
            raise ConfigError(
                f"mix.num_rows={num_rows}: source {name} has {available[name]} rows for its share of {count}; lower "
                "it or the source's weight"
            )
    return counts
