"""From a micro-batch to its loss: asks the student for what the objective needs, and nothing else.

T positions, K support ids. The one place where batch, student and objective meet; each of them knows nothing of the
others.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd.errors import InternalError, NonFiniteError
from opd.ops import OutputHead
from opd.types import PAD_ID
from services.trainer.batch import DistillBatch
from services.trainer.diagnostics.means import Mean
from services.trainer.objectives.config import ObjectiveConfig
from services.trainer.objectives.contract import LossInputs, LossOutput
from services.trainer.objectives.objective import Objective
from services.trainer.objectives.supports import SupportScores, TopKScores, build_support
from services.trainer.student import Student


@dataclass(frozen=True, kw_only=True, slots=True)
class _StudentSide:
    """With gradient; a part the objective does not need is None. `support_TK` may be up to a constant per position."""

    support_TK: Tensor | None = None
    sampled_T: Tensor | None = None
    outside_T: Tensor | None = None
    entropy_T: Tensor | None = None
    full_divergence_T: Tensor | None = None


class DistillLoss:
    """The objective applied to micro-batches of one student."""

    def __init__(
        self,
        student: Student,
        objective: Objective,
        config: ObjectiveConfig,
        teacher_head: Callable[[], OutputHead] | None = None,
    ) -> None:
        """`teacher_head` gives the pinned teacher's output head; only the whole vocabulary needs it."""
        self._student = student
        self._objective = objective
        self._needs = objective.needs
        self._config = config
        self._teacher_head = teacher_head

    def __call__(self, batch: DistillBatch) -> LossOutput:
        """The loss as a sum, with gradient. `NonFiniteError` names the rollout that brought a number that is none."""
        support = self._support(batch) if self._needs.support else None
        side = self._full_vocabulary(batch) if self._needs.full_vocabulary else self._at_ids(batch, support)
        output = self._objective(
            LossInputs(
                valid_T=batch.valid_T,
                supervised_T=batch.supervised_T,
                position_T=batch.position_T,
                rollout_index_T=batch.rollout_index_T,
                support_ids_TK=support.ids_TK if support else None,
                support_mask_TK=support.mask_TK if support else None,
                student_logprobs_TK=side.support_TK,
                teacher_logprobs_TK=support.teacher_logprobs_TK if support else None,
                student_outside_logprobs_T=side.outside_T,
                student_sampled_logprobs_T=side.sampled_T,
                teacher_sampled_logprobs_T=batch.teacher_sampled_logprobs_T,
                student_entropy_T=side.entropy_T,
                full_divergence_T=side.full_divergence_T,
                advantage_T=batch.advantage_T,
                rollout_logprobs_T=batch.rollout_logprobs_T,
                rollout_num_positions_T=batch.num_trained_T,
                name_position=batch.name_position,
            )
        )
        places = self._student.num_places(batch.tokens)
        padding = Mean(total=places - len(batch.tokens.input_ids_N), count=places)
        return replace(output, metrics=output.metrics | {"timing/padding_share": padding})

    def _support(self, batch: DistillBatch) -> SupportScores:
        teacher_ids_Tk = batch.teacher_topk_ids_Tk
        return build_support(
            self._config.support,
            TopKScores(ids_Tk=batch.support_ids_TK, teacher_logprobs_Tk=batch.teacher_support_logprobs_TK),
            None
            if teacher_ids_Tk is None
            else TopKScores(ids_Tk=teacher_ids_Tk, teacher_logprobs_Tk=batch.teacher_topk_logprobs_Tk),
        )

    def _at_ids(self, batch: DistillBatch, support: SupportScores | None) -> _StudentSide:
        """One forward pass over all the ids that are needed, side by side."""
        if support is not None and not self._needs.whole_vocabulary:
            logits_TK = self._student.support_logits(batch, support.ids_TK)
            _refuse_non_finite(logits_TK, support.ids_TK, batch)
            return _StudentSide(support_TK=logits_TK)
        sampled_T1 = batch.sampled_ids_T[:, None]
        ids_TK = sampled_T1 if support is None else torch.cat([sampled_T1, support.ids_TK], dim=1)
        outside_of = support.ids_TK if support is not None and self._needs.outside else None
        scores = self._student.scores(batch, ids_TK, support_ids_TS=outside_of, wants_entropy=self._needs.entropy)
        _refuse_non_finite(scores.logprobs_TK, ids_TK, batch)
        return _StudentSide(
            support_TK=None if support is None else scores.logprobs_TK[:, 1:],
            sampled_T=scores.logprobs_TK[:, 0] if self._needs.sampled else None,
            outside_T=scores.outside_logprobs_T,
            entropy_T=scores.entropy_T,
        )

    def _full_vocabulary(self, batch: DistillBatch) -> _StudentSide:
        """The sampled token's log-prob comes from the same pass."""
        if batch.teacher_hidden_TG is None or self._teacher_head is None:
            raise InternalError("the objective needs the teacher's hidden states and head, which were not given")
        sampled_T1 = batch.sampled_ids_T[:, None]
        scores = self._student.full_divergence(
            batch,
            batch.teacher_hidden_TG,
            self._teacher_head(),
            sampled_T1,
            teacher_temperature=self._config.teacher_temperature,
            beta=self._config.divergence_beta,
            wants_entropy=self._needs.entropy,
        )
        _refuse_non_finite(scores.student_logprobs_TK, sampled_T1, batch)
        return _StudentSide(
            sampled_T=scores.student_logprobs_TK[:, 0] if self._needs.sampled else None,
            entropy_T=scores.student_entropy_T,
            full_divergence_T=scores.divergence_T,
        )


def _refuse_non_finite(logprobs_TK: Tensor, ids_TK: Tensor, batch: DistillBatch) -> None:
    finite_T = (logprobs_TK.detach().isfinite() | (ids_TK == PAD_ID)).all(dim=1)
    if not finite_T.all():
        row = int((~finite_T).nonzero()[0])
        raise NonFiniteError(f"the student's log-probs at {batch.name_position(row)} are not finite")
