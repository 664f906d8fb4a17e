"""A tiny student and teacher over a whole vocabulary, from which every input of a loss can be made and unmade.

T positions, V ids, k of both top-k sets.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from opd.types import PAD_ID
from services.trainer.objectives import Support
from services.trainer.objectives.contract import LossInputs
from services.trainer.objectives.supports import TopKScores, build_support

NUM_POSITIONS, NUM_IDS, SCORE_TOP_K = 6, 9, 4


@dataclass(frozen=True, kw_only=True)
class TinyModels:
    """Full distributions of both models, the sampled ids and the rollout each position belongs to."""

    student_logits_TV: Tensor
    teacher_logits_TV: Tensor
    sampled_T: Tensor
    score_top_k: int = SCORE_TOP_K

    @property
    def student_ids_Tk(self) -> Tensor:
        return self.student_logits_TV.detach().sort(dim=-1, descending=True, stable=True).indices[:, : self.score_top_k]

    @property
    def teacher_ids_Tk(self) -> Tensor:
        return self.teacher_logits_TV.sort(dim=-1, descending=True, stable=True).indices[:, : self.score_top_k]

    def inputs(
        self,
        support: Support = Support.STUDENT,
        *,
        logits_TV: Tensor | None = None,
        valid_T: Tensor | None = None,
        rollout_logprobs_T: Tensor | None = None,
        rollout_num_positions_T: Tensor | None = None,
    ) -> LossInputs:
        """Everything at once, with gradient into `logits_TV` (default: the student's own)."""
        student_TV = (self.student_logits_TV if logits_TV is None else logits_TV).log_softmax(-1)
        teacher_TV = self.teacher_logits_TV.log_softmax(-1)
        scores = [
            TopKScores(
                ids_Tk=ids,
                student_logprobs_Tk=student_TV.gather(-1, ids),
                teacher_logprobs_Tk=teacher_TV.gather(-1, ids),
            )
            for ids in (self.student_ids_Tk, self.teacher_ids_Tk)
        ]
        chosen = build_support(support, *scores)
        sampled_T1 = self.sampled_T.unsqueeze(-1)
        return LossInputs(
            valid_T=torch.ones(len(self.sampled_T), dtype=torch.bool) if valid_T is None else valid_T,
            support_ids_TK=chosen.ids_TK.masked_fill(~chosen.mask_TK, PAD_ID),
            support_mask_TK=chosen.mask_TK,
            student_logprobs_TK=chosen.student_logprobs_TK,
            teacher_logprobs_TK=chosen.teacher_logprobs_TK,
            student_sampled_logprobs_T=student_TV.gather(-1, sampled_T1).squeeze(-1),
            teacher_sampled_logprobs_T=teacher_TV.gather(-1, sampled_T1).squeeze(-1),
            rollout_logprobs_T=rollout_logprobs_T,
            rollout_num_positions_T=rollout_num_positions_T,
        )


@pytest.fixture
def make_models() -> Callable[..., TinyModels]:
    def make(
        seed: int = 0,
        *,
        score_top_k: int = SCORE_TOP_K,
        num_positions: int = NUM_POSITIONS,
        dtype: torch.dtype = torch.float64,
    ) -> TinyModels:
        generator = torch.Generator().manual_seed(seed)
        student = 1.5 * torch.randn(num_positions, NUM_IDS, generator=generator, dtype=torch.float64)
        teacher = student + torch.randn(num_positions, NUM_IDS, generator=generator, dtype=torch.float64)
        return TinyModels(
            student_logits_TV=student.to(dtype).requires_grad_(),
            teacher_logits_TV=teacher.to(dtype),
            sampled_T=torch.randint(0, NUM_IDS, (num_positions,), generator=generator),
            score_top_k=score_top_k,
        )

    return make
