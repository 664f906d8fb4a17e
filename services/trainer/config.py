"""Everything a training run can be told, strict: unknown keys fail, contradictions name the field and the way out.

Defaults are the paper's (Table 2) where it has one. Light: no torch, so a wrong configuration is refused at once.
Secrets do not stand here: the queue's URL comes from `OPD_REDIS_URL` where `teacher.url` is left empty.
"""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from opd.settings import Seed, Settings
from opd.tracing import TracingSettings
from opd.types import Encoding
from services.trainer.alarms.config import AlarmSettings
from services.trainer.distributed.config import DistributedSettings
from services.trainer.loggers.config import LoggerSettings
from services.trainer.lora_config import LoraSettings, check_lora
from services.trainer.metrics_config import MetricsSettings
from services.trainer.objective_checks import check_objective, with_group_size
from services.trainer.objectives.config import ObjectiveConfig, ObjectiveKind
from services.trainer.pipeline import PipelineSettings, check_pipeline
from services.trainer.prompts import Overlong
from services.trainer.recipes.self_distillation.settings import HeldTeacherSettings, check_held_teacher
from services.trainer.rollout.settings import EngineKind, VllmRolloutSettings, check_engine

_NAME = re.compile(r"[a-z0-9-]{1,63}")


def _check_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("is not a name; use 1 to 63 of lower-case letters, digits and -")
    return value


def _check_top_k(value: int) -> int:
    if value < 1 and value != -1:
        raise ValueError("is no number of tokens; give 1 or more, or -1 for all")
    return value


Name = Annotated[str, AfterValidator(_check_name)]
SamplingTopK = Annotated[int, AfterValidator(_check_top_k)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class OnScoreFailure(StrEnum):
    ABORT = "abort"
    """The run ends with the error."""
    DROP = "drop"
    """The rollout is counted as lost and the step trains on the others."""


class StudentSettings(Settings):
    """The model that is trained."""

    model: str
    """Hugging Face folder (safetensors) or hub name."""
    device: str = "auto"
    """`auto` takes CUDA where there is one; otherwise `cpu`, `cuda` or `cuda:N`."""
    gradient_checkpointing: bool = False
    """Recomputes layers on the way back: less memory, about a third more time."""
    max_micro_batch_tokens: PositiveInt = 32768
    """Tokens of one forward and backward pass, a prompt of several rollouts counted once. Attention reads at most four
    times as many, such a prompt for each rollout. The step's result does not depend on it."""
    row_chunk: PositiveInt = 256
    """Response positions whose logits over the whole vocabulary exist at a time."""
    threads: PositiveInt | None = None
    """CPU threads that compute; unset has `OMP_NUM_THREADS`, or else the machine, decide."""
    lora: LoraSettings | None = None
    """Trains low-rank adapters instead of the weights, as `[student.lora]`; unset trains all weights."""


class TeacherSettings(HeldTeacherSettings):
    """Who scores, and how long the run puts up with nobody doing so."""

    pool: Name = "teacher"
    """The pool's name; [a-z0-9-]{1,63}."""
    tenant: Name = "default"
    """Who asks; [a-z0-9-]{1,63}."""
    url: str = ""
    """redis://, rediss://, unix:// (the queue), grpc://host:port or grpcs://host:port; empty means `OPD_REDIS_URL`."""
    token_file: Path | None = None
    """Holds the tenant's token; unset takes `OPD_TOKEN_FILE` or `OPD_TOKEN`, and none where there is neither."""
    ca_file: Path | None = None
    """For TLS: PEM file of the authorities that may have signed the server's certificate; unset takes the system's."""
    cert_file: Path | None = None
    """For mutual TLS: PEM file of a certificate of our own."""
    key_file: Path | None = None
    """PEM file of its key."""
    trust_network: bool = False
    """The way to the teacher is private: the token may travel without TLS."""
    encoding: Encoding = Encoding.FLOAT16
    """How log-probs travel; computed in fp32 either way. float16 takes a third off the bytes and moves the gradient by
    less than a thousandth of what another batch does (docs/decisions/0006-bytes-on-the-wire.md)."""
    timeout_s: PositiveFloat = 300.0
    """Of one request, counted from its admission."""
    wait_s: Seconds = 600.0
    """How long the start waits for the pool's first replica."""
    patience_s: PositiveFloat = 120.0
    """How long a lost queue is waited for in mid-run."""
    head_cache: Path = Path("~/.cache/opd/heads")
    """Where output heads are kept, by their hash; only `objective.kind=full_vocabulary` fetches one."""
    on_score_failure: OnScoreFailure = OnScoreFailure.ABORT
    """What a rollout that cannot be scored does to the run: `abort` or `drop`."""


ONLY_TEACHER = ""
"""The name of a run's teacher where it has one, which is what a prompt that names none says."""


class NamedTeacherSettings(Settings):
    """One of several teachers, as `[teachers.NAME]`; what is not given is as in `[teacher]`."""

    pool: Name | None = None
    """The pool's name; unset is NAME itself."""
    tenant: Name | None = None
    """Who asks."""
    url: str | None = None
    """As `teacher.url`."""
    token_file: Path | None = None
    """As `teacher.token_file`."""
    ca_file: Path | None = None
    """As `teacher.ca_file`."""
    cert_file: Path | None = None
    """As `teacher.cert_file`."""
    key_file: Path | None = None
    """As `teacher.key_file`."""
    encoding: Encoding | None = None
    """How log-probs travel."""
    timeout_s: PositiveFloat | None = None
    """Of one request."""


class RolloutSettings(Settings):
    """What is sampled from the student at each step."""

    prompts_per_step: PositiveInt = 64
    """Prompts of one optimizer step."""
    rollouts_per_prompt: PositiveInt = 4
    """Responses sampled for each of them; with `objective.kind=grpo` the default is 8."""
    temperature: PositiveFloat = 1.0
    """Of sampling; also of the loss unless `objective.student_temperature` says otherwise."""
    top_p: Fraction = 1.0
    """1 keeps every token."""
    top_k: SamplingTopK = -1
    """Sampling's own cut, unrelated to `objective.score_top_k`; -1 keeps every token."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are left out or refused, see `data.overlong`."""
    max_response_tokens: PositiveInt = 7168
    """A response that has not ended by then is cut off, and trains."""
    max_slots: PositiveInt = 256
    """Responses decoded at the same time; bounds the memory of their caches."""
    threads: PositiveInt | None = None
    """CPU threads while responses are sampled, as a teacher on the same machine works at the same time; unset has as
    many as for everything else."""
    engine: EngineKind = EngineKind.TRANSFORMERS
    """What samples: `transformers`, in the trainer, or `vllm`, in a process of its own."""
    max_drift: PositiveFloat | None = None
    """How far vLLM's log-probs may be from the trainer's in the probe after each publish, in nats, mean over its
    tokens; unset is 0.001 in float32 and 0.1 in bfloat16."""
    vllm: VllmRolloutSettings = Field(default_factory=VllmRolloutSettings)


class OptimSettings(Settings):
    """AdamW after common practice; the paper gives the learning rate alone."""

    lr: PositiveFloat = 1e-6
    """Constant after the warm-up."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of matrices; norms and biases do not decay."""
    max_grad_norm: PositiveFloat = 1.0
    """The gradient is scaled down to this norm."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly."""


class CheckpointSettings(Settings):
    """When the student is saved; the last completed step is saved whenever a run ends in order."""

    every_steps: Annotated[int, Field(ge=0)] = 50
    """0 saves at the end only."""
    keep_last: PositiveInt = 2
    """Older checkpoints are removed after a new one is whole."""


class LogSettings(Settings):
    """What people see."""

    level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = "info"
    """debug, info, warning or error."""
    as_json: bool = False
    """One JSON object a line on standard error."""
    requests: bool = False
    """Two lines for each rollout: sent, and scored or not."""


class HttpSettings(Settings):
    """The status server."""

    enabled: bool = True
    """Whether there is one."""
    host: str = "127.0.0.1"
    """Loopback unless a collector on another machine is to read it."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0 takes any free port, which is logged."""


class DataSettings(Settings):
    """Where prompts come from and how they are put into words."""

    files: tuple[str, ...] = ()
    """Parquet or JSON-lines files in the form of the paper's sets, or names of Hugging Face data sets."""
    split: str = "train"
    """Of a Hugging Face data set; files have none."""
    teacher_column: str | None = None
    """The column that names each row's teacher, one of `teachers`; unset has all rows scored by `teacher`."""
    source_weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Shares of the rows' `data_source`s in the prompts of a step; unset means by their number."""
    template: str | None = None
    """Asks every question in this template, `dapo` or `boxed`; unset leaves prompts as they are in the file."""
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Passed on to the student's chat template, such as enable_thinking."""
    teacher_tokenizer: str = ""
    """Folder or hub name whose chat template puts prompts as the teacher is to see them; empty means the student's."""
    teacher_template: str | None = None
    """Asks the teacher in this template; unset means as the student is asked."""
    teacher_chat_template_kwargs: dict[str, bool | int | float | str] | None = None
    """For the teacher's view; unset means as for the student."""
    teacher_context: str | None = None
    """Text after the question that the teacher alone reads; `{answer}`, `{context}` and `{question}` are filled in from
    the row, other braces stay. Unset shows it nothing more than the student."""
    teacher_context_column: str | None = None
    """The column that fills `{context}`, such as a worked solution."""
    overlong: Overlong = Overlong.FILTER
    """What happens to prompts above `rollout.max_prompt_tokens`: `filter` or `refuse`."""
    num_epochs: PositiveInt = 1
    """How often each prompt is used, where `steps` does not say when to end."""
    grade: bool = True
    """Whether rollouts are graded where answers are known, for `outcome/accuracy`."""


class EvaluationSettings(Settings):
    """When and how the student's answers are graded; the paper's sampling by default."""

    files: tuple[str, ...] = ()
    """Problem files; without any there is no evaluation."""
    before: bool = True
    """Before the first step."""
    after: bool = True
    """After the last one."""
    every_steps: Annotated[int, Field(ge=0)] = 0
    """In between; 0 means not."""
    num_samples: PositiveInt = 16
    """Responses per problem."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """0 is greedy."""
    top_p: Fraction = 0.95
    """1 keeps every token."""
    max_response_tokens: PositiveInt = 31744
    """Bounded by the student's context."""
    template: str | None = None
    """Asks every question in this template; unset leaves prompts as they are in the file."""


class TrainSettings(Settings):
    """One training run."""

    student: StudentSettings
    teacher: TeacherSettings = Field(default_factory=TeacherSettings)
    teachers: dict[Name, NamedTeacherSettings] = Field(default_factory=dict)
    """Several teachers by the names that `data.teacher_column` holds; empty has `teacher` alone."""
    data: DataSettings = Field(default_factory=DataSettings)
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    pipeline: PipelineSettings = Field(default_factory=PipelineSettings)
    optim: OptimSettings = Field(default_factory=OptimSettings)
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)
    alarms: AlarmSettings = Field(default_factory=AlarmSettings)
    loggers: LoggerSettings = Field(default_factory=LoggerSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    http: HttpSettings = Field(default_factory=HttpSettings)
    tracing: TracingSettings = Field(default_factory=TracingSettings)
    """One trace per rollout."""
    distributed: DistributedSettings = Field(default_factory=DistributedSettings)
    """Where torchrun starts several processes."""
    run_dir: Path = Path("runs/train")
    """Everything the run writes."""
    seed: Seed = 0
    """Of prompts, rollouts and evaluation."""
    steps: PositiveInt | None = None
    """Optimizer steps; unset means `data.num_epochs` over the prompts."""
    deterministic: bool = False
    """The same run again on the same machine: deterministic kernels, rollouts scored one by one, training when all of a
    step's scores are there."""

    _group_size = model_validator(mode="before")(with_group_size)

    @model_validator(mode="after")
    def _check_across(self) -> Self:
        if not self.data.files:
            raise ValueError("data.files=[]: is empty; give the files that hold the prompts")
        is_full_vocabulary = self.objective.kind is ObjectiveKind.FULL_VOCABULARY
        check_held_teacher(
            self.teacher, url=self.teacher.url, is_full_vocabulary=is_full_vocabulary, num_named=len(self.teachers)
        )
        self._check_teachers()
        self._check_context()
        check_objective(self)
        check_lora(self)
        check_pipeline(
            self.pipeline,
            staleness_cap=self.objective.staleness_cap,
            deterministic=self.deterministic,
            needs_head=is_full_vocabulary,
        )
        check_engine(self)
        if self.steps is not None and self.optim.warmup_steps > self.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} is above steps={self.steps}, so the learning rate would "
                "never be reached; lower it"
            )
        if self.evaluation.every_steps and not self.evaluation.files:
            raise ValueError(
                f"evaluation.every_steps={self.evaluation.every_steps} has nothing to evaluate on; set evaluation.files"
            )
        return self

    def teachers_by_name(self) -> dict[str, TeacherSettings]:
        """Every teacher of the run with its settings; a single one has the empty name."""
        if not self.teachers:
            return {ONLY_TEACHER: self.teacher}
        return {
            name: self.teacher.model_copy(update={"pool": name} | named.model_dump(exclude_none=True))
            for name, named in self.teachers.items()
        }

    def _check_context(self) -> None:
        column, text = self.data.teacher_context_column, self.data.teacher_context
        if column is not None and "{context}" not in (text or ""):
            raise ValueError(
                f"data.teacher_context_column={column}: data.teacher_context has no {{context}} for it to fill; put it "
                "there, or leave the column out"
            )

    def _check_teachers(self) -> None:
        if self.teachers and self.objective.kind is ObjectiveKind.FULL_VOCABULARY:
            raise ValueError(
                f"objective.kind=full_vocabulary with teachers={', '.join(self.teachers)}: the whole vocabulary needs "
                "the output head of the one teacher; leave [teachers] out or choose another kind"
            )
        if self.data.teacher_column is not None and not self.teachers:
            raise ValueError(
                f"data.teacher_column={self.data.teacher_column}: there are no teachers to name; give a table "
                "[teachers.NAME] for each, or leave it out"
            )
        if self.teachers and self.data.teacher_column is None:
            raise ValueError(
                f"teachers={', '.join(self.teachers)}: no column says which rows are whose; set data.teacher_column"
            )
