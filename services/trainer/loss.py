"""From a micro-batch to its loss: asks the student for what the objective needs, and nothing else.

T positions, K student support ids, k teacher top-k ids. The one place where batch, student and objective meet; each of
them knows nothing of the others.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.errors import InternalError, NonFiniteError
from opd.ops import OutputHead
from services.trainer.batch import DistillBatch
from services.trainer.objectives.config import ObjectiveConfig, ObjectiveKind
from services.trainer.objectives.contract import LossInputs, LossOutput, Objective
from services.trainer.objectives.supports import SupportScores, TopKScores, build_support
from services.trainer.student import Student


@dataclass(frozen=True, kw_only=True, slots=True)
class _StudentLogprobs:
    """With gradient; a part the objective does not need is None."""

    support_TK: Tensor | None
    teacher_ids_Tk: Tensor | None
    sampled_T: Tensor | None
    full_reverse_kl_T: Tensor | None = None


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
        self._config = config
        self._teacher_head = teacher_head

    def __call__(self, batch: DistillBatch) -> LossOutput:
        """The loss as a sum, with gradient. `NonFiniteError` names the rollout that brought a number that is none."""
        logprobs = self._student_logprobs(batch)
        support = self._support(batch, logprobs)
        lengths_B = torch.bincount(batch.rollout_index_T, minlength=batch.num_rollouts)
        return self._objective(
            LossInputs(
                valid_T=torch.ones_like(batch.sampled_ids_T, dtype=torch.bool),
                support_ids_TK=support.ids_TK if support else None,
                support_mask_TK=support.mask_TK if support else None,
                student_logprobs_TK=support.student_logprobs_TK if support else None,
                teacher_logprobs_TK=support.teacher_logprobs_TK if support else None,
                student_sampled_logprobs_T=logprobs.sampled_T,
                teacher_sampled_logprobs_T=batch.teacher_sampled_logprobs_T,
                full_reverse_kl_T=logprobs.full_reverse_kl_T,
                rollout_logprobs_T=batch.rollout_logprobs_T,
                rollout_num_positions_T=lengths_B[batch.rollout_index_T],
            )
        )

    def _student_logprobs(self, batch: DistillBatch) -> _StudentLogprobs:
        """One forward pass over all the ids that are needed, side by side."""
        objective = self._objective
        if objective.needs_full_vocabulary:
            return self._full_vocabulary(batch)
        columns: list[Tensor] = []
        columns += [batch.support_ids_TK] if objective.needs_student_ids else []
        columns += [batch.teacher_topk_ids_Tk] if objective.needs_teacher_ids else []
        columns += [batch.sampled_ids_T[:, None]] if objective.needs_sampled else []
        all_TK = self._student.logprobs(batch, torch.cat(columns, dim=1))
        _refuse_non_finite(all_TK, batch)
        parts = iter(all_TK.split([column.shape[1] for column in columns], dim=1))
        return _StudentLogprobs(
            support_TK=next(parts) if objective.needs_student_ids else None,
            teacher_ids_Tk=next(parts) if objective.needs_teacher_ids else None,
            sampled_T=next(parts).squeeze(1) if objective.needs_sampled else None,
        )

    def _full_vocabulary(self, batch: DistillBatch) -> _StudentLogprobs:
        """The sampled token's log-prob comes from the same pass."""
        if batch.teacher_hidden_TG is None or self._teacher_head is None:
            raise InternalError("the objective needs the teacher's hidden states and head, which were not given")
        scores = self._student.full_reverse_kl(
            batch,
            batch.teacher_hidden_TG,
            self._teacher_head(),
            batch.sampled_ids_T[:, None],
            teacher_temperature=self._config.teacher_temperature,
        )
        _refuse_non_finite(scores.student_logprobs_TK, batch)
        return _StudentLogprobs(
            support_TK=None,
            teacher_ids_Tk=None,
            sampled_T=scores.student_logprobs_TK.squeeze(1) if self._objective.needs_sampled else None,
            full_reverse_kl_T=scores.reverse_kl_T,
        )

    def _support(self, batch: DistillBatch, logprobs: _StudentLogprobs) -> SupportScores | None:
        if self._config.kind is not ObjectiveKind.TOP_K:
            return None
        student = TopKScores(
            ids_Tk=batch.support_ids_TK,
            student_logprobs_Tk=logprobs.support_TK,
            teacher_logprobs_Tk=batch.teacher_support_logprobs_TK,
        )
        teacher = TopKScores(
            ids_Tk=batch.teacher_topk_ids_Tk,
            student_logprobs_Tk=logprobs.teacher_ids_Tk,
            teacher_logprobs_Tk=batch.teacher_topk_logprobs_Tk,
        )
        return build_support(self._config.support, student, teacher)


def _refuse_non_finite(logprobs_TK: Tensor, batch: DistillBatch) -> None:
    finite_T = logprobs_TK.detach().isfinite().all(dim=1)
    if finite_T.all():
        return
    row = int((~finite_T).nonzero()[0])
    rollout = batch.rollout_ids[int(batch.rollout_index_T[row])]
    raise NonFiniteError(
        f"rollout {rollout}: the student's log-probs at response position {int(batch.position_T[row])} are not finite"
    )
