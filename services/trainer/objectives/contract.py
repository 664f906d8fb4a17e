"""What every part of a loss takes and gives: one input type, one output type, one protocol.

T packed response positions of one micro-batch (any rollouts, any order), K support ids per position. A `Term` gives
one loss per position; `Objective` adds terms up and sums them. Losses come back as sums, never as means: the loop
divides by the denominator of the whole optimizer batch (`aggregation.denominator`), which makes the step exact under
any split into micro-batches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Protocol

from torch import Tensor

from opd.errors import InternalError
from opd.types import Capability
from services.trainer.diagnostics.means import Mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a loss has to be given; `|` joins the needs of several."""

    support: bool = False
    """Both models' log-probs on a support."""
    normalizer: bool = False
    """The student's log-probs over the full vocabulary, not just up to a constant per position."""
    candidates: bool = False
    """The teacher's log-probs at the student's top-k ids."""
    teacher_top_k: bool = False
    """The teacher's top-k ids, with its log-probs there."""
    outside: bool = False
    """The student's mass outside the support."""
    sampled: bool = False
    """The student's and the sampler's log-probs of the sampled token."""
    teacher_sampled: bool = False
    """The teacher's log-prob of the sampled token."""
    entropy: bool = False
    """The student's entropy."""
    full_vocabulary: bool = False
    """The divergence over the whole vocabulary, for which the teacher's hidden states and head are needed."""
    advantage: bool = False
    """The advantage of each rollout in its group, so verified answers."""

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(**{each.name: getattr(self, each.name) or getattr(other, each.name) for each in fields(Needs)})

    @property
    def whole_vocabulary(self) -> bool:
        """Whether the student's logits are needed at all ids, and not on the support alone."""
        return self.normalizer or self.outside or self.sampled or self.entropy or self.full_vocabulary

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the teacher has to supply; empty for a loss without one."""
        wanted = {
            Capability.CANDIDATE_LOGPROBS: self.candidates,
            Capability.TEACHER_TOP_K: self.teacher_top_k,
            Capability.SAMPLED_LOGPROBS: self.teacher_sampled,
            Capability.HIDDEN_STATES: self.full_vocabulary,
        }
        return frozenset(capability for capability, is_needed in wanted.items() if is_needed)


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
    supervised_T: Tensor | None = None
    """Bool: which positions the teacher's signal trains; None means all valid ones. The others are beyond the
    horizon."""
    position_T: Tensor | None = None
    """Index within the response."""
    rollout_index_T: Tensor | None = None
    """Which rollout of the micro-batch a position belongs to."""
    support_ids_TK: Tensor | None = None
    """int64; only for naming what is wrong."""
    support_mask_TK: Tensor | None = None
    """Bool: which columns belong to the support; a row without any is an empty support."""
    student_logprobs_TK: Tensor | None = None
    """With gradient, at the student temperature: over the full vocabulary or, where no term needs the normaliser, up
    to a constant per position."""
    teacher_logprobs_TK: Tensor | None = None
    """Over the full vocabulary at the teacher temperature."""
    student_outside_logprobs_T: Tensor | None = None
    """With gradient: log of the student's mass outside the support, about `MASKED_LOGIT` where nothing is outside."""
    student_sampled_logprobs_T: Tensor | None = None
    """Of the sampled token, by the student as it is now, with gradient."""
    teacher_sampled_logprobs_T: Tensor | None = None
    student_entropy_T: Tensor | None = None
    """With gradient, in nats over the full vocabulary."""
    full_divergence_T: Tensor | None = None
    """Over the whole vocabulary, with gradient, of the form the configuration names."""
    advantage_T: Tensor | None = None
    """Of the position's rollout within its group."""
    rollout_logprobs_T: Tensor | None = None
    """Of the sampled token, under the sampler that drew it."""
    rollout_num_positions_T: Tensor | None = None
    """How many valid positions the whole rollout of each position has; only `sequence_mean` reads it."""

    name_position: Callable[[int], str] = "position {} of the micro-batch".format
    """How an error names a position."""

    def require(self, name: str) -> Tensor:
        """The field, or `InternalError` when the objective needs it and the loop left it out."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise InternalError(f"the objective needs LossInputs.{name}, which was not given")
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionLosses:
    """What a term says of T positions."""

    loss_T: Tensor
    """With gradient, finite at invalid positions too, where it means nothing."""
    counted: Mapping[str, Tensor] = field(default_factory=dict)
    """Metrics by name, as sums over the valid positions the term was given."""


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


class Term(Protocol):
    """One kind of loss, as a pure function from packed positions to one loss each, which says what it needs."""

    @property
    def needs(self) -> Needs: ...

    def __call__(self, inputs: LossInputs) -> PositionLosses:
        """Raises `NonFiniteError` naming the first valid position with a value that is not finite."""
        ...
