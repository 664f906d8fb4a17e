"""All stages in order, with a count of each: read, render, exact, length, semantic, mix."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from opd.errors import ConfigError
from services.trainer.recipes.data.candidates import Candidate, Drop, in_template, load_candidates
from services.trainer.recipes.data.config import DataRecipeSettings
from services.trainer.recipes.data.embeddings import Embedder, build_embedder
from services.trainer.recipes.data.stages import Outcome, draw_mix, drop_exact, drop_long, drop_near
from services.trainer.recipes.data.writing import check_json

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(what is done, number of rows) -> a context that gives the function to advance by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCount:
    """What one stage did. Example: ``StageCount(stage="exact", num_in=17917, num_out=17398, dropped={...})``."""

    stage: str
    num_in: int
    num_out: int
    dropped: dict[str, int]
    """By reason."""
    num_out_by_source: dict[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What came out."""

    kept: list[Candidate]
    drops: list[Drop]
    """In the order of the stages."""
    counts: list[StageCount]
    num_against: int
    embedder: Embedder | None
    num_bare: int
    """Rows in no known template, whose whole message was taken for the question."""


class _Stages:
    """Passes candidates on and counts."""

    def __init__(self, candidates: list[Candidate]) -> None:
        self.kept = candidates
        self.drops: list[Drop] = []
        self.counts: list[StageCount] = []
        self.count("read", len(candidates), [])

    def run(self, stage: str, outcome: Outcome) -> None:
        num_in = len(self.kept)
        self.kept, drops = outcome
        self.drops += drops
        self.count(stage, num_in, drops)
        if not self.kept:
            raise ConfigError(f"{stage}: no row is left of {num_in}; loosen that stage's settings")

    def count(self, stage: str, num_in: int, drops: Sequence[Drop]) -> None:
        by_source = Counter(candidate.source for candidate in self.kept)
        self.counts.append(
            StageCount(
                stage=stage,
                num_in=num_in,
                num_out=len(self.kept),
                dropped=dict(sorted(Counter(str(drop.reason) for drop in drops).items())),
                num_out_by_source=dict(sorted(by_source.items())),
            )
        )


def run_pipeline(settings: DataRecipeSettings, progress: Progress) -> Recipe:
    """Deterministic: the same files and settings give the same rows in the same order. Raises `ConfigError`."""
    # A model that is not to be had is better known before anything is read.
    embedder = build_embedder(settings.semantic) if settings.semantic.enabled else None
    candidates, against = _read(settings, progress)
    if settings.output.suffix != ".parquet":
        # Better known before questions are embedded than after.
        check_json([row.rendered() for row in candidates], f"output={settings.output}", "write .parquet")
    num_bare = sum(not candidate.problem.template for candidate in candidates)
    if settings.template is not None:
        candidates = [in_template(candidate, settings.template) for candidate in candidates]
    stages = _Stages(candidates)
    if settings.exact.enabled:
        stages.run("exact", drop_exact(stages.kept, against))
    _run_length(settings, stages, progress)
    if embedder is not None:
        _run_semantic(settings, stages, against, embedder, progress)
    if settings.mix.enabled:
        stages.run("mix", draw_mix(stages.kept, settings.sources, settings.mix, settings.seed))
    return Recipe(
        kept=stages.kept,
        drops=stages.drops,
        counts=stages.counts,
        num_against=len(against),
        embedder=embedder,
        num_bare=num_bare,
    )


def _read(settings: DataRecipeSettings, progress: Progress) -> tuple[list[Candidate], list[Candidate]]:
    num_files = sum(len(source.files) for source in settings.sources.values()) + len(settings.against.files)
    with progress("reading", num_files) as advance:

        def on_read(file: str) -> None:
            advance(1)

        candidates = [
            candidate
            for name, source in settings.sources.items()
            for candidate in load_candidates(name, source.files, source.split, on_read)
        ]
        return candidates, load_candidates("against", settings.against.files, settings.against.split, on_read)


def _run_length(settings: DataRecipeSettings, stages: _Stages, progress: Progress) -> None:
    if not settings.length.tokenizer:
        return
    from services.trainer.models import load_tokenizer

    tokenizer = load_tokenizer(settings.length.tokenizer)
    # The limit is ours to check; the library would warn of its own.
    tokenizer.model_max_length = 2**31
    with progress("counting tokens", len(stages.kept)) as advance:
        stages.run("length", drop_long(stages.kept, tokenizer, settings.length.max_prompt_tokens, advance))


def _run_semantic(
    settings: DataRecipeSettings,
    stages: _Stages,
    against: Sequence[Candidate],
    embedder: Embedder,
    progress: Progress,
) -> None:
    num_others = len({other.question for other in against})
    with progress("embedding and comparing", 2 * (len(stages.kept) + num_others)) as advance:
        outcome = drop_near(
            stages.kept,
            against,
            embedder,
            threshold=settings.semantic.threshold,
            within=settings.semantic.within,
            advance=advance,
        )
        stages.run("semantic", outcome)
