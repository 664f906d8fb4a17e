"""What the trainer's tests share: tiny random models, prompts, and a score client that fakes nothing but transport."""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd.types import Capability, Encoding, Ids, ScoreReply, ScoreRequest, Scores, TeacherInfo
from opd.vocabulary import Vocabulary
from services.trainer.batch import ScoredRollout
from services.trainer.config import OptimSettings
from services.trainer.loop import LoopSettings, TrainingLoop
from services.trainer.loss import DistillLoss
from services.trainer.objectives.config import ObjectiveConfig
from services.trainer.objectives.dispatch import build_objective
from services.trainer.pipeline import PipelineMode
from services.trainer.rollout.base import RolloutRequest, SamplingParams, derive_seed
from services.trainer.rollout.transformers_engine import TransformersEngine
from services.trainer.step_gradient import StepGradient
from services.trainer.student import Student, StudentOptimizer
from services.trainer.teacher_client import ScoreWants, TeacherClient
from services.trainer.teachers import NoTeachers, TeacherRouter
from services.trainer.weights import SharedWeights

NUM_IDS = 24
EOS = 1
VOCABULARY = Vocabulary(
    num_defined_ids=NUM_IDS, id_map_hash="m" * 32, special_tokens={"eos_token": EOS}, chat_template_hash="t"
)
TEACHER_INFO = TeacherInfo(
    teacher="pool",
    fingerprint="teacher-1",
    model="tiny",
    engine="exact",
    vocab_rows=NUM_IDS,
    num_defined_ids=NUM_IDS,
    id_map_hash="m" * 32,
    eos_token_ids=(EOS,),
    chat_template_hash="t",
    capabilities=frozenset(Capability),
)


def tiny_model(seed: int, *, vocab: int = NUM_IDS, **changes: Any) -> Any:
    """A random two-layer Qwen3 in fp32, with sharper predictions than a fresh one so that KL has room to fall."""
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**(settings | changes)))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15.0)
    torch.set_rng_state(generator_state)
    return model.eval()


def in_float64(model: Any) -> Any:
    """Norms of the library round to fp32 whatever they are given, so PyTorch's own take their place."""
    norms = [name for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")]
    for name in norms:
        norm = model.get_submodule(name)
        exact = nn.RMSNorm(norm.weight.shape[0], eps=getattr(norm, "variance_epsilon", None) or norm.eps)
        with torch.no_grad():
            # Gemma's gain counts from 1.
            exact.weight.copy_(norm.weight + 1 if type(norm).__name__.startswith("Gemma") else norm.weight)
        model.set_submodule(name, exact)
    return model.double().eval()


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """In float64 throughout, where that is asked for."""
    return in_float64(model) if dtype is torch.float64 else model.to(dtype)


def tiny_tokenizer(vocab: int = NUM_IDS) -> Any:
    """Words w0, w1, ... with <eos> at `EOS`."""
    words = {("<eos>" if index == EOS else f"w{index}"): index for index in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="w0")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}w2"
    return fast


def exact_scores(model: Any, request: ScoreRequest) -> Scores:
    """The teacher's answer from one plain float64 forward pass over prompt and response."""
    ids = np.concatenate([request.prompt_token_ids, request.response_token_ids]).astype(np.int64)
    with torch.no_grad():
        logits_LV = model(input_ids=torch.from_numpy(ids)[None]).logits[0].double()
    rows_RV = logits_LV[request.prompt_token_ids.size - 1 : -1] / request.teacher_temperature
    logprobs_RV = rows_RV.log_softmax(dim=-1)
    sampled_R1 = torch.from_numpy(request.response_token_ids.astype(np.int64))[:, None]
    candidates = None
    if request.candidate_token_ids is not None:
        candidates_RK = torch.from_numpy(request.candidate_token_ids.astype(np.int64))
        candidates = logprobs_RV.gather(1, candidates_RK).float().numpy()
    topk = logprobs_RV.topk(request.score_top_k, dim=-1) if request.score_top_k else None
    entropy_R = -(logprobs_RV.exp() * logprobs_RV).sum(-1)
    return Scores(
        sampled_logprobs=logprobs_RV.gather(1, sampled_R1)[:, 0].float().numpy() if request.wants_sampled else None,
        candidate_logprobs=candidates,
        topk_token_ids=topk.indices.int().numpy() if topk else None,
        topk_logprobs=topk.values.float().numpy() if topk else None,
        entropy=entropy_R.float().numpy() if request.wants_entropy else None,
    )


@dataclass
class ExactClient:
    """Answers every request at once from a real model; `alter` may replace a reply or raise in its place."""

    model: Any
    alter: Callable[[ScoreRequest, ScoreReply], ScoreReply] = lambda request, reply: reply
    current_info: TeacherInfo = TEACHER_INFO
    requests: list[ScoreRequest] = field(default_factory=list)
    on_submit: Callable[[ScoreRequest], None] = lambda request: None

    def submit(self, request: ScoreRequest) -> Future[ScoreReply]:
        self.requests.append(request)
        self.on_submit(request)
        future: Future[ScoreReply] = Future()
        try:
            scores = exact_scores(self.model, request)
            reply = ScoreReply(
                rollout_id=request.rollout_id, teacher_fingerprint=request.teacher_fingerprint, scores=scores
            )
            future.set_result(self.alter(request, reply))
        except Exception as error:
            future.set_exception(error)
        return future

    def info(self) -> TeacherInfo:
        return self.current_info

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, kw_only=True)
class TinyPrompt:
    """What the loop wants to know of a prompt."""

    prompt_token_ids: Ids
    teacher_prompt_token_ids: Ids
    teacher: str = ""
    template: str = ""
    answer: str | None = None


class FixedPrompts:
    """Two to five prompt tokens, different at every step."""

    def __init__(self, prompts_per_step: int) -> None:
        self._prompts_per_step = prompts_per_step

    def step_prompts(self, step: int) -> Sequence[TinyPrompt]:
        generator = np.random.default_rng(step)
        prompts = [
            generator.integers(2, NUM_IDS, size=generator.integers(2, 6)).astype(np.int32)
            for _ in range(self._prompts_per_step)
        ]
        return [TinyPrompt(prompt_token_ids=ids, teacher_prompt_token_ids=ids) for ids in prompts]


@dataclass(kw_only=True)
class Setup:
    """A whole training loop over tiny parts, each of which a test may replace before `loop`."""

    student_model: Any = None
    teacher_model: Any = None
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(score_top_k=6))
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=3e-3))
    num_steps: int = 3
    prompts_per_step: int = 4
    rollouts_per_prompt: int = 2
    max_response_tokens: int = 12
    max_micro_batch_tokens: int = 64
    max_slots: int = 3
    drops_unscored: bool = False
    first_step: int = 0
    client: Any = None
    engine: Any = None
    reward: Any = None
    horizon: Any = None
    mode: PipelineMode = PipelineMode.STREAMING
    max_policy_lag: int = 0

    def __post_init__(self) -> None:
        self.student_model = self.student_model or tiny_model(1)
        self.teacher_model = self.teacher_model or tiny_model(2)
        self.client = self.client or ExactClient(model=self.teacher_model)
        self.engine = self.engine or TransformersEngine(
            self.student_model,
            eos_token_ids=[EOS],
            num_defined_ids=NUM_IDS,
            score_top_k=self.objective.score_top_k,
            max_slots=self.max_slots,
        )
        self.student = Student(self.student_model, num_defined_ids=NUM_IDS)
        self.optimizer = StudentOptimizer(self.student_model, self.optim)
        objective = build_objective(self.objective)
        self.teacher = teacher_client(
            self.client, score_top_k=self.objective.score_top_k, needs=objective.needs.capabilities
        )
        self.teachers: Any = NoTeachers()
        if self.objective.uses_teacher:
            self.teacher.shake_hands(wait_s=0)
            self.teachers = TeacherRouter({"": self.teacher})
        self.loss = DistillLoss(self.student, objective, self.objective)

    def loop(self) -> TrainingLoop:
        settings = LoopSettings(
            run="run",
            num_steps=self.num_steps,
            rollouts_per_prompt=self.rollouts_per_prompt,
            sampling=SamplingParams(max_response_tokens=self.max_response_tokens),
            seed=0,
            max_micro_batch_tokens=self.max_micro_batch_tokens,
            aggregation=self.objective.aggregation,
            has_entropy_bonus=self.objective.entropy_bonus > 0,
            drops_unscored=self.drops_unscored,
            mode=self.mode,
            max_policy_lag=self.max_policy_lag,
        )
        return TrainingLoop(
            settings,
            prompts=FixedPrompts(self.prompts_per_step),
            engine=self.engine,
            teachers=self.teachers,
            student=self.student,
            loss=self.loss,
            optimizer=self.optimizer,
            weights=SharedWeights(self.engine),
            reward=self.reward,
            horizon=self.horizon,
            first_step=self.first_step,
        )

    def accumulate(self, scored: Sequence[ScoredRollout], *, streams: bool = False) -> torch.Tensor:
        """The gradient of the mean over these, in one vector: cut by length, or as they come where it `streams`."""
        gradient = StepGradient(
            self.student,
            self.loss,
            self.optimizer,
            max_tokens=self.max_micro_batch_tokens,
            aggregation=self.objective.aggregation,
        )
        if streams:
            gradient.train_full(scored)
        else:
            gradient.hold(scored)
        gradient.finish()
        return torch.cat([parameter.grad.flatten() for parameter in self.student_model.parameters()])

    def parameters(self) -> torch.Tensor:
        """Every weight in one vector."""
        return torch.cat([parameter.detach().flatten().clone() for parameter in self.student_model.parameters()])


def step_requests(step: int, places: Iterable[int], *, num_prompts: int, per_prompt: int) -> list[RolloutRequest]:
    """For the rollouts of a step at these places among all, those of a prompt side by side."""
    prompts = FixedPrompts(num_prompts).step_prompts(step)
    return [
        RolloutRequest(
            rollout_id=f"run.{step}.{place}",
            group=place // per_prompt,
            prompt_token_ids=prompts[place // per_prompt].prompt_token_ids,
            seed=derive_seed(0, step, place),
        )
        for place in places
    ]


def teacher_client(client: Any, *, score_top_k: int = 6, **changes: Any) -> TeacherClient:
    wants = ScoreWants(tenant="tenant", teacher="pool", score_top_k=score_top_k, encoding=Encoding.FLOAT32, **changes)
    return TeacherClient(client, wants, vocabulary=VOCABULARY, student_name="tiny")


def reverse_kl(student_logprobs: np.ndarray, teacher_logprobs: np.ndarray) -> float:
    """Eq 5 at one position, in float64 and with plain sums: KL of the two distributions renormalised on the support."""
    student, teacher = np.exp(student_logprobs.astype(np.float64)), np.exp(teacher_logprobs.astype(np.float64))
    student, teacher = student / student.sum(), teacher / teacher.sum()
    return math.fsum(float(s * (np.log(s) - np.log(t))) for s, t in zip(student, teacher, strict=True))
