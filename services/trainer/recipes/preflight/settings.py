"""What a preflight is told. Light: no torch."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from opd.settings import Seed, Settings
from services.trainer.config import Fraction, Name, PositiveFloat, PositiveInt
from services.trainer.objectives.config import ObjectiveConfig

AS_IS = "as-is"
"""The name of the prompts as they stand in the file, beside those of the templates."""


class Thresholds(Settings):
    """What the rules of `rules.py` compare with; each with its place in the paper."""

    overlap_mass: Fraction = 0.97
    """4.1, B.1: shared tokens hold 0.97 to 0.99 of both models' probability."""
    low_overlap_mass: Fraction = 0.9
    """C.2: below it the shared tokens miss much of what the teacher wants, however good the advantage looks."""
    overlap_ratio: Fraction = 0.7
    """3.1, 4.1: runs that work begin at 0.72 (k = 16). With a small vocabulary much of a top-k has no probability, so
    that a low ratio alone is not held against a teacher."""
    mass99_overlap: Fraction = 0.9
    """Not the paper's: agreement of the smallest sets that hold 0.99 of each model, which is what the ratio means where
    k is no small part of what matters. Set between the testbed's good and bad teachers."""
    entropy_gap_share: PositiveFloat = 1.0
    """4.1: the gap narrows in runs that work; one as large as the student's own entropy is a mismatch."""
    accuracy_gap: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """3.2: by how much a teacher has to be ahead for there to be anything to gain."""
    pilot_gain: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """3.2: accuracy that a pilot has to add."""


class PilotSettings(Settings):
    """Short real training runs, one per teacher."""

    steps: Annotated[int, Field(ge=0)] = 0
    """0 means none, and condition 2 then cannot be told. Slopes need 4 or more."""
    prompts_per_step: PositiveInt = 32
    """Prompts of one step."""
    rollouts_per_prompt: PositiveInt = 4
    """Responses sampled for each of them."""
    lr: PositiveFloat = 1e-6
    """As the training run is to have it."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Likewise."""


class PreflightSettings(Settings):
    """One student and the teachers it may learn from."""

    student: str
    """Hugging Face folder (safetensors) or hub name."""
    teachers: Annotated[tuple[str, ...], Field(min_length=1)]
    """Each a folder or hub name, which is loaded here, or a pool: `redis://...#NAME`, `grpc://host:port#NAME`, or NAME
    alone for one behind `OPD_REDIS_URL`."""
    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    """Parquet or JSON-lines files in the form of the paper's sets, or names of data sets."""
    split: str = "train"
    """Of a data set by name."""
    num_prompts: PositiveInt = 200
    """Drawn by the seed."""
    rollouts_per_prompt: PositiveInt = 2
    """Responses sampled from the student for each, and from teachers loaded here for their accuracy."""
    templates: tuple[str, ...] = ("dapo", "boxed")
    """Compared with the prompts as they are (5.2); empty compares nothing."""
    template_prompts: PositiveInt = 64
    """Of the prompts, for each template."""
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Passed on to the student's chat template, such as enable_thinking. This and the three below are the training
    run's settings of the same names in `data`, and mean the same."""
    teacher_tokenizer: str = ""
    """Folder or hub name whose chat template puts prompts as teachers are to see them; empty means the student's."""
    teacher_template: str | None = None
    """Asks the teachers in this template; unset means as the student is asked."""
    teacher_chat_template_kwargs: dict[str, bool | int | float | str] | None = None
    """For the teachers' view; unset means as for the student."""
    batch_rollouts: PositiveInt = 64
    """Of the one batch whose loss and gradient norm are looked at."""
    probe_rollouts: Annotated[int, Field(ge=2)] = 16
    """Of it, those whose gradients are compared for their coherence."""
    temperature: PositiveFloat = 1.0
    """Of sampling, and so of the accuracies too."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are left out."""
    max_response_tokens: PositiveInt = 2048
    """A response that has not ended by then is cut off."""
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    """Of the batch's loss and of the pilots."""
    pilot: PilotSettings = Field(default_factory=PilotSettings)
    thresholds: Thresholds = Field(default_factory=Thresholds)
    tenant: Name = "default"
    """Who asks pools."""
    wait_s: Annotated[float, Field(ge=0)] = 60.0
    """How long a pool's first replica is waited for."""
    device: str = "auto"
    """Of everything loaded here."""
    max_slots: PositiveInt = 256
    """Responses decoded at the same time."""
    max_micro_batch_tokens: PositiveInt = 32768
    """Padded tokens of one forward and backward pass."""
    seed: Seed = 0
    """Of prompts, samples and intervals."""
    output_dir: Path = Path("runs/preflight")
    """Everything that is written; the same command goes on with what is there."""
