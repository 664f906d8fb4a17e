"""What `gpu_step` times: a student of random weights, alone or in shards, and optimizer steps on random rollouts.

R response tokens, K ids per position.
"""

import argparse

import numpy as np
import torch

from benchmarks.gpu_sides import SHAPES
from benchmarks.random_model import build_model
from opd.types import FinishReason, Rollout, Scores
from services.trainer.batch import ScoredRollout
from services.trainer.config import OptimSettings
from services.trainer.distributed.process_group import TorchRanks
from services.trainer.distributed.ranks import Ranks
from services.trainer.distributed.sharding import shard_student
from services.trainer.distributed.step_scope import step_scope
from services.trainer.loss import DistillLoss
from services.trainer.objectives.config import ObjectiveConfig, ObjectiveKind
from services.trainer.objectives.dispatch import build_objective
from services.trainer.step_gradient import StepGradient
from services.trainer.student import Student, StudentOptimizer


class GpuTraining:
    """One rank's part of a run without sampling and scoring."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        self.shape = SHAPES[args.shape]
        self.rank, self.num_ranks = ranks.rank, ranks.num_ranks
        self._device = torch.device(args.device)
        self.device_name = torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"
        model = build_model(self.shape)
        if isinstance(ranks, TorchRanks):
            shard_student(model, ranks.mesh)
        else:
            model.to(self._device)
        self._student = Student(model, num_defined_ids=self.shape.vocabulary, gradient_checkpointing=True)
        self._optimizer = StudentOptimizer(model, OptimSettings(lr=1e-5))
        config = ObjectiveConfig(kind=ObjectiveKind(args.objective), score_top_k=args.k)
        self._loss = DistillLoss(self._student, build_objective(config), config)
        self._scope = step_scope(ranks, self._student)
        self._max_tokens = args.micro_batch
        generator = np.random.default_rng(ranks.rank)
        self._scored = [self._rollout(generator, args, index) for index in range(args.rollouts)]
        self.num_tokens = ranks.total(sum(item.num_tokens for item in self._scored))
        """Prompt and response tokens of a step, over all ranks."""

    def step(self, number: int) -> float:
        """One optimizer step; returns the loss."""
        gradient = StepGradient(
            self._student, self._loss, self._optimizer, max_tokens=self._max_tokens, scope=self._scope
        )
        gradient.hold(self._scored)
        losses = gradient.finish()
        self._optimizer.clip()
        self._optimizer.step(number)
        return losses["loss/objective"].value

    def synchronize(self) -> None:
        """Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int | None:
        """Allocated on this rank's device at most, weights included."""
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None

    def _rollout(self, generator: np.random.Generator, args: argparse.Namespace, index: int) -> ScoredRollout:
        num_response, vocabulary = args.response, self.shape.vocabulary

        def logprobs(*more: int) -> np.ndarray:
            drawn: np.ndarray = -generator.exponential(3.0, (num_response, *more)).astype(np.float32) - 2.0
            return drawn

        topk_RK = generator.integers(1, vocabulary, (num_response, args.k), np.int32)
        rollout = Rollout(
            rollout_id=f"bench.0.{index}",
            group=index,
            prompt_token_ids=generator.integers(1, vocabulary, args.prompt, np.int32),
            response_token_ids=generator.integers(1, vocabulary, num_response, np.int32),
            rollout_logprobs=logprobs(),
            sampled_logprobs=logprobs(),
            topk_token_ids=topk_RK,
            topk_logprobs=logprobs(args.k),
            entropy=np.ones(num_response, np.float32),
            finish_reason=FinishReason.LENGTH,
            policy_version=0,
        )
        scores = Scores(sampled_logprobs=logprobs(), candidate_logprobs=logprobs(args.k))
        return ScoredRollout(rollout=rollout, scores=scores)
