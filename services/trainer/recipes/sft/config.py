"""Settings of supervised fine-tuning; defaults are the paper's (Table 3). Light: no torch."""

from typing import Annotated

from pydantic import Field

from opd.settings import Settings
from services.trainer.config import OptimSettings, PositiveFloat, PositiveInt

Share = Annotated[float, Field(ge=0, lt=1)]


class SftOptimSettings(Settings):
    """AdamW with linear warm-up and a cosine down to 0; where Table 3 is silent, what its framework does."""

    lr: PositiveFloat = 1e-5
    """At the end of the warm-up."""
    warmup_share: Share = 0.05
    """Of all steps."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of matrices; norms and biases do not decay."""
    max_grad_norm: PositiveFloat = 1.0
    """The gradient is scaled down to this norm."""

    def as_optim(self) -> OptimSettings:
        """For the student's optimizer, whose own warm-up is not used."""
        return OptimSettings(
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )


class SftSettings(Settings):
    """One fine-tuning run."""

    num_epochs: PositiveInt = 1
    """How often each example is trained on."""
    sequence_tokens: PositiveInt = 14336
    """Of one row; bounded by the student's context. An example above it is dropped and counted."""
    rows_per_batch: PositiveInt = 8
    """Rows of one batch."""
    accumulation: PositiveInt = 1
    """Batches of one optimizer step."""
    packing: bool = True
    """Several examples share a row, none of them seeing another; otherwise a row holds one."""
    max_micro_batch_tokens: PositiveInt = 16384
    """Padded tokens of one forward and backward pass, at least one row; the result does not depend on it."""
    row_chunk: PositiveInt = 256
    """Positions whose logits over the whole vocabulary exist at a time."""
    gradient_checkpointing: bool = False
    """Recomputes layers on the way back: less memory, about a third more time."""
    optim: SftOptimSettings = Field(default_factory=SftOptimSettings)
    validation_share: Share = 0.02
    """Of the examples, held out to tell the loss before and after; at least one, at most 256; 0 holds out none."""
    checkpoint_every_steps: PositiveInt = 100
    """A run that was ended goes on from there."""
    log_every_steps: PositiveInt = 10
    """How often a line says where the run stands."""
