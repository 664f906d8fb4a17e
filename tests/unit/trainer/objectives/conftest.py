"""A tiny student and teacher over a whole vocabulary, from which every input of a loss can be made and unmade.

T positions, V ids, k of both top-k sets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.ops import MASKED_LOGIT
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
        **more: Any,
    ) -> LossInputs:
        """Everything at once, with gradient into `logits_TV` (default: the student's own)."""
        student_TV = (self.student_logits_TV if logits_TV is None else logits_TV).log_softmax(-1)
        teacher_TV = self.teacher_logits_TV.log_softmax(-1)
        scores = [
            TopKScores(ids_Tk=ids, teacher_logprobs_Tk=teacher_TV.gather(-1, ids))
            for ids in (self.student_ids_Tk, self.teacher_ids_Tk)
        ]
        chosen = build_support(support, *scores)
        sampled_T1 = self.sampled_T.unsqueeze(-1)
        fields = {
            "valid_T": torch.ones(len(self.sampled_T), dtype=torch.bool) if valid_T is None else valid_T,
            "position_T": torch.arange(len(self.sampled_T)),
            "rollout_index_T": torch.zeros(len(self.sampled_T), dtype=torch.int64),
            "support_ids_TK": chosen.ids_TK,
            "support_mask_TK": chosen.mask_TK,
            # As from the student's forward pass: NaN, without a gradient, in columns that are not used.
            "student_logprobs_TK": student_TV.gather(-1, chosen.ids_TK.clamp_min(0)).masked_fill(
                ~chosen.mask_TK, torch.nan
            ),
            "teacher_logprobs_TK": chosen.teacher_logprobs_TK,
            "student_outside_logprobs_T": self._outside(student_TV, chosen.ids_TK),
            "student_sampled_logprobs_T": student_TV.gather(-1, sampled_T1).squeeze(-1),
            "teacher_sampled_logprobs_T": teacher_TV.gather(-1, sampled_T1).squeeze(-1),
            "student_entropy_T": -(student_TV.exp() * student_TV).sum(-1),
            "full_divergence_T": (student_TV.exp() * (student_TV - teacher_TV)).sum(-1),
        }
        return LossInputs(**(fields | more))

    def _outside(self, student_TV: Tensor, ids_TK: Tensor) -> Tensor:
        inside_TV = (ids_TK.unsqueeze(-1) == torch.arange(student_TV.shape[-1])).any(dim=1)
        return student_TV.masked_fill(inside_TV, MASKED_LOGIT).logsumexp(-1)


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
