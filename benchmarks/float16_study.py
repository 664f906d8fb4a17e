"""What float16 on the wire does to a training step: loss, gradient and metrics of the same rollouts, both ways.

Student and teacher are the bundled ones; rollouts are sampled, scored in fp32, and taken through the wire once as
float32 and once as float16. The yardstick is another batch of the same size by the same student: what is far below the
difference between two batches cannot matter to a run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from opd.errors import OpdError
from opd.types import Encoding, Rollout, ScoreReply, ScoreRequest
from opd.wire.messages import decode_reply, encode_reply
from services.teacher_server.engines.base import ScoringEngine
from services.teacher_server.engines.transformers_engine import EngineLimits, load_engine
from services.trainer.batch import ScoredRollout, build_batch, micro_batches
from services.trainer.config import OptimSettings
from services.trainer.diagnostics import StepDiagnostics
from services.trainer.loss import DistillLoss
from services.trainer.models import load_model
from services.trainer.objectives.config import GradientForm, ObjectiveConfig, ObjectiveKind, Support
from services.trainer.objectives.dispatch import build_objective
from services.trainer.prompts import PromptSchedule, PromptView, load_problems, tokenize_problems
from services.trainer.rollout.base import RolloutRequest, SamplingParams, derive_seed
from services.trainer.rollout.transformers_engine import TransformersEngine
from services.trainer.student import Student, StudentOptimizer
from testbed.stack import DATA, MODELS

MAX_RESPONSE_TOKENS = 320
MICRO_BATCH_TOKENS = 8192
# The demo's, so that a few steps get somewhere.
OPTIM = OptimSettings(lr=2e-4, warmup_steps=3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One objective on one batch; gradients are of the mean over positions."""

    state: str
    objective: str
    loss: float
    grad_norm: float
    loss_shift: float
    """float16 - float32, in nats."""
    grad_error: float
    """Norm of the difference of the two gradients."""
    grad_cosine: float
    """NaN where the float32 gradient is zero."""
    batch_loss_shift: float
    """The other batch's loss less this one's."""
    batch_grad_difference: float
    """Norm of the difference of the two batches' gradients."""

    @property
    def relative_grad_error(self) -> float:
        """Over the gradient's norm; NaN where that is zero."""
        return self.grad_error / self.grad_norm if self.grad_norm else math.nan

    @property
    def share_of_batch_noise(self) -> float:
        """Over the difference between two batches; NaN where there is none."""
        return self.grad_error / self.batch_grad_difference if self.batch_grad_difference else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricShift:
    """A metric of one batch: its value, what float16 changes, and what another batch changes."""

    state: str
    metric: str
    value: float
    float16: float
    other_batch: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The same rollouts with their scores as they come out of either encoding."""

    scored: dict[Encoding, list[ScoredRollout]]

    @property
    def num_positions(self) -> int:
        return sum(item.num_response_tokens for item in self.scored[Encoding.FLOAT32])


def objectives(k: int) -> dict[str, ObjectiveConfig]:
    """What is compared."""
    return {
        "top_k exact": ObjectiveConfig(score_top_k=k),
        "top_k exact, union": ObjectiveConfig(score_top_k=k, support=Support.UNION),
        "top_k policy": ObjectiveConfig(score_top_k=k, gradient=GradientForm.POLICY),
        "sampled_token": ObjectiveConfig(score_top_k=k, kind=ObjectiveKind.SAMPLED_TOKEN),
    }


class Study:
    """One student and one teacher in this process."""

    def __init__(self, *, student: str, teacher: str, k: int, num_prompts: int, num_samples: int, seed: int) -> None:
        loaded = load_model(str(MODELS / student), device="cpu")
        self._k = k
        self._num_samples = num_samples
        self._seed = seed
        self._model = loaded.model
        self.student = Student(loaded.model, num_defined_ids=loaded.num_defined_ids)
        self._optimizer = StudentOptimizer(loaded.model, OPTIM)
        self._sampler = TransformersEngine(
            loaded.model,
            eos_token_ids=loaded.eos_token_ids,
            num_defined_ids=loaded.num_defined_ids,
            score_top_k=k,
        )
        self._teacher: ScoringEngine = load_engine(
            str(MODELS / teacher),
            teacher="teacher",
            device="cpu",
            dtype="float32",
            max_context=0,
            limits=EngineLimits(),
            cache_folder=None,
            observe=None,
        )
        problems = load_problems(str(DATA / "train.jsonl"))
        prompts = tokenize_problems(problems, PromptView(tokenizer=loaded.tokenizer), max_prompt_tokens=256)
        self._schedule = PromptSchedule(prompts, prompts_per_step=num_prompts, seed=seed, num_epochs=100)

    def batch(self, step: int) -> Batch:
        """Samples from the student as it is, and scores."""
        prompts = self._schedule.step_prompts(step)
        wanted = [
            RolloutRequest(
                rollout_id=f"study.{step}.{group * self._num_samples + sample}",
                group=group,
                prompt_token_ids=prompt.prompt_token_ids,
                seed=derive_seed(self._seed, step, group, sample),
            )
            for group, prompt in enumerate(prompts)
            for sample in range(self._num_samples)
        ]
        sampling = SamplingParams(max_response_tokens=MAX_RESPONSE_TOKENS, seed=self._seed)
        rollouts = self._sampler.sample(wanted, sampling)
        requests = [self._request(rollout) for rollout in rollouts]
        outcomes = self._teacher.score(requests)
        scored: dict[Encoding, list[ScoredRollout]] = {encoding: [] for encoding in Encoding}
        for rollout, request, outcome in zip(rollouts, requests, outcomes, strict=True):
            if isinstance(outcome, OpdError):
                raise outcome
            reply = ScoreReply(rollout_id=rollout.rollout_id, teacher_fingerprint="", scores=outcome)
            for encoding, items in scored.items():
                came = _through_the_wire(reply, request, encoding)
                items.append(ScoredRollout(rollout=rollout, scores=came.scores))
        return Batch(scored=scored)

    def train(self, config: ObjectiveConfig, steps: int, encoding: Encoding, say: Callable[[str], None]) -> None:
        """Steps as the training loop takes them, on scores as `encoding` brings them."""
        for step in range(steps):
            batch = self.batch(step)
            loss, _ = self.gradient(batch.scored[encoding], config)
            self._optimizer.clip()
            self._optimizer.step(step)
            say(f"step {step}: loss {loss:.4f}")

    def gradient(self, scored: Sequence[ScoredRollout], config: ObjectiveConfig) -> tuple[float, Tensor]:
        """Mean loss over positions and its gradient as one vector; also left in the parameters."""
        loss_of = DistillLoss(self.student, build_objective(config), config)
        num_positions = sum(item.num_response_tokens for item in scored)
        self._optimizer.zero_grad()
        total = 0.0
        for part in micro_batches(scored, MICRO_BATCH_TOKENS):
            loss = loss_of(build_batch(part)).loss_sum / num_positions
            loss.backward()
            total += float(loss.detach())
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        return total, torch.cat([gradient.flatten().double() for gradient in gradients])

    def compare(self, state: str, first: Batch, second: Batch) -> list[Comparison]:
        """Every objective on the first batch in both encodings, and on the second."""
        return [self._compare(state, name, config, first, second) for name, config in objectives(self._k).items()]

    def _compare(self, state: str, name: str, config: ObjectiveConfig, first: Batch, second: Batch) -> Comparison:
        loss, gradient = self.gradient(first.scored[Encoding.FLOAT32], config)
        rounded_loss, rounded = self.gradient(first.scored[Encoding.FLOAT16], config)
        other_loss, other = self.gradient(second.scored[Encoding.FLOAT32], config)
        norm = float(gradient.norm())
        cosine = float(torch.nn.functional.cosine_similarity(rounded, gradient, dim=0)) if norm else math.nan
        return Comparison(
            state=state,
            objective=name,
            loss=loss,
            grad_norm=norm,
            loss_shift=rounded_loss - loss,
            grad_error=float((rounded - gradient).norm()),
            grad_cosine=cosine,
            batch_loss_shift=other_loss - loss,
            batch_grad_difference=float((other - gradient).norm()),
        )

    def _request(self, rollout: Rollout) -> ScoreRequest:
        return ScoreRequest(
            rollout_id=rollout.rollout_id,
            tenant="study",
            teacher="teacher",
            prompt_token_ids=rollout.prompt_token_ids,
            response_token_ids=rollout.response_token_ids,
            candidate_token_ids=rollout.topk_token_ids,
            score_top_k=self._k,
            wants_entropy=True,
        )


def metric_shifts(state: str, first: Batch, second: Batch) -> list[MetricShift]:
    """Every metric of a step that reads teacher scores."""
    plain, rounded, other = (
        _metrics(batch.scored[encoding])
        for batch, encoding in ((first, Encoding.FLOAT32), (first, Encoding.FLOAT16), (second, Encoding.FLOAT32))
    )
    return [
        MetricShift(
            state=state,
            metric=name,
            value=value,
            float16=abs(rounded[name] - value),
            other_batch=abs(other[name] - value),
        )
        for name, value in plain.items()
        if name.startswith(("distill/", "loss/", "rollout/teacher"))
    ]


def value_errors(batch: Batch) -> dict[str, float]:
    """How far log-probs are moved, in nats, and how often two of a top-k row change places."""
    pairs = list(zip(batch.scored[Encoding.FLOAT32], batch.scored[Encoding.FLOAT16], strict=True))
    plain = np.concatenate([one.scores.candidate_logprobs.ravel() for one, _ in pairs])  # type: ignore[union-attr]
    rounded = np.concatenate([other.scores.candidate_logprobs.ravel() for _, other in pairs])  # type: ignore[union-attr]
    moved = np.concatenate([one.scores.topk_token_ids != other.scores.topk_token_ids for one, other in pairs])
    error = np.abs(rounded.astype(np.float64) - plain)
    return {
        "mean_error_nats": float(error.mean()),
        "mean_signed_error_nats": float((rounded.astype(np.float64) - plain).mean()),
        "max_error_nats": float(error.max()),
        "lowest_logprob": float(plain.min()),
        "top_k_rows_reordered": float(moved.any(axis=1).mean()),
    }


def _through_the_wire(reply: ScoreReply, request: ScoreRequest, encoding: Encoding) -> ScoreReply:
    asked = replace(request, encoding=encoding)
    return decode_reply(encode_reply(reply, asked), asked)


def _metrics(scored: Sequence[ScoredRollout]) -> dict[str, float]:
    diagnostics = StepDiagnostics()
    for item in scored:
        diagnostics.add_rollout(item.rollout, item.scores)
    return diagnostics.summary().values
