"""What `opd cold-start` can be told; defaults are the paper's (5.1, C.1, Table 3). Light: no torch."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from opd.settings import Seed, Settings
from services.trainer.config import Fraction, LogSettings, PositiveFloat, PositiveInt, SamplingTopK
from services.trainer.recipes.sft.config import SftSettings


class ModelSettings(Settings):
    """One of the two models."""

    model: str
    """Hugging Face folder (safetensors) or hub name."""
    device: str = "auto"
    """`auto` takes CUDA where there is one; otherwise `cpu`, `cuda` or `cuda:N`."""
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Passed on to its chat template, such as enable_thinking."""


class ColdStartDataSettings(Settings):
    """The prompts, and which of them are for the cold start."""

    files: tuple[str, ...]
    """Parquet or JSON-lines files in the form of the paper's sets, or names of Hugging Face data sets."""
    split: str = "train"
    """Of a Hugging Face data set; files have none."""
    template: str | None = "boxed"
    """Asks every question in this template; unset (an empty value) leaves prompts as they are in the file."""
    share: Fraction = 0.5
    """Of the prompts; the others are left for distillation."""
    num_prompts: PositiveInt | None = None
    """A number instead of a share."""


class ColdStartRolloutSettings(Settings):
    """How the teacher is sampled."""

    rollouts_per_prompt: PositiveInt = 1
    """Responses to each prompt."""
    temperature: PositiveFloat = 0.7
    """Of sampling."""
    top_p: Fraction = 0.95
    """1 keeps every token."""
    top_k: SamplingTopK = -1
    """-1 keeps every token."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are left out."""
    max_response_tokens: PositiveInt = 12288
    """Bounded by the teacher's context."""
    max_slots: PositiveInt = 256
    """Responses decoded at the same time."""


class FilterSettings(Settings):
    """Which responses are not for imitation. A response is dropped for the first reason that holds."""

    max_repeated_line_share: Fraction = 0.5
    """Dropped when more of its lines than this share occurred before in it (and it has at least 8 lines)."""
    ngram: PositiveInt = 16
    """Tokens of the runs that are counted for the next setting."""
    max_repeated_ngram_share: Fraction = 0.5
    """Dropped when more of its n-grams than this share occurred before in it (and it has at least 64)."""
    max_block_tokens: PositiveInt = 512
    """Longest block looked for by the next setting."""
    min_block_repeats: Annotated[int, Field(ge=2)] = 4
    """Dropped when one block stands this often in a row and the repetition is 64 tokens long or more."""
    require_answer: bool = True
    """Drops a response without an answer in its template's form."""
    require_correct: bool = False
    """Drops a wrong answer too, where the prompt's answer is known. The paper keeps them."""


class ColdStartSettings(Settings):
    """One cold start."""

    student: ModelSettings
    teacher: ModelSettings
    data: ColdStartDataSettings
    rollout: ColdStartRolloutSettings = Field(default_factory=ColdStartRolloutSettings)
    filters: FilterSettings = Field(default_factory=FilterSettings)
    sft: SftSettings = Field(default_factory=SftSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    run_dir: Path = Path("runs/cold-start")
    """Everything that is written; the same command again goes on where it stopped."""
    seed: Seed = 0
    """Of the choice of prompts, the rollouts and the order of examples."""

    @model_validator(mode="after")
    def _check_across(self) -> Self:
        if not self.data.files:
            raise ValueError("data.files=[]: is empty; give the files that hold the prompts")
        return self
