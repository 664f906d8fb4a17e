"""What every objective takes and gives: one input type, one output type, one protocol.

T packed response positions of one micro-batch (any rollouts, any order), K support ids per position. Losses come back
as sums, never as means: the loop divides by the denominator of the whole optimizer batch (`aggregation.denominator`),
which makes the step exact under any split into micro-batches.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from opd.errors import InternalError
from services.trainer.diagnostics.means import Mean


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """T positions. Log-probs are natural, fp32 or better, and NaN where they were not computed.

    Example: two positions, three support ids, the last one of the second position unused::

        LossInputs(valid_T=tensor([True, True]), support_ids_TK=tensor([[7, 3, 1], [1, 8, -1]]),
                   support_mask_TK=tensor([[True, True, True], [True, True, False]]),
                   student_logprobs_TK=..., teacher_logprobs_TK=...)
    """

    valid_T: Tensor
    """Bool: which positions train. What an invalid one holds reaches neither loss nor gradient."""
    support_ids_TK: Tensor | None = None
    """int64; only for naming what is wrong."""
    support_mask_TK: Tensor | None = None
    """Bool: which columns belong to the support; a row without any is an empty support."""
    student_logprobs_TK: Tensor | None = None
    """With gradient, over the full vocabulary at the student temperature."""
    teacher_logprobs_TK: Tensor | None = None
    """Over the full vocabulary at the teacher temperature."""
    student_sampled_logprobs_T: Tensor | None = None
    """Of the sampled token, by the student as it is now, with gradient."""
    teacher_sampled_logprobs_T: Tensor | None = None
    full_reverse_kl_T: Tensor | None = None
    """Over the whole vocabulary, with gradient."""
    rollout_logprobs_T: Tensor | None = None
    """Of the sampled token, under the sampler that drew it."""
    rollout_num_positions_T: Tensor | None = None
    """How many valid positions the whole rollout of each position has; only `sequence_mean` reads it."""

    def require(self, name: str) -> Tensor:
        """The field, or `InternalError` when the objective needs it and the loop left it out."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise InternalError(f"the objective needs LossInputs.{name}, which was not given")
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """The loss of one micro-batch, as sums."""

    loss_sum: Tensor
    """Scalar with gradient: the weighted sum over valid positions."""
    position_loss_T: Tensor
    """[T] detached, staleness weight included, aggregation weight not; NaN at invalid positions."""
    num_positions: int
    """Valid positions, those with an empty support included."""
    metrics: dict[str, Mean]
    """Joined over micro-batches by sum and count."""


class Objective(Protocol):
    """A loss over packed positions, which says what it has to be given."""

    @property
    def needs_student_ids(self) -> bool:
        """Student log-probs and teacher log-probs at the student's top-k ids."""
        ...

    @property
    def needs_teacher_ids(self) -> bool:
        """Student log-probs at the teacher's top-k ids."""
        ...

    @property
    def needs_teacher_top_k(self) -> bool:
        """The teacher's top-k ids, with its log-probs there."""
        ...

    @property
    def needs_sampled(self) -> bool:
        """Student, teacher and rollout log-probs of the sampled token."""
        ...

    @property
    def needs_full_vocabulary(self) -> bool:
        """The reverse KL over the whole vocabulary, for which the teacher's hidden states and head are needed."""
        ...

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Raises `NonFiniteError` naming the first valid position with a value that is not finite."""
        ...
