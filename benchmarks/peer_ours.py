"""This project's side of `peer_step`: Redis, a teacher process and a trainer process, as a user starts them.

The first loss is computed by the trainer's own parts on rollouts that were sampled elsewhere: the teacher process sends
its hidden states over gRPC, and the `full_vocabulary` objective takes the mean over all response positions.
"""

import json
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from benchmarks.peer_plan import TEACHER, Plan
from opd.errors import InternalError
from opd.queue.embedded import EmbeddedRedis
from opd.types import FinishReason, Rollout
from services.trainer.run_log import read_steps
from testbed.processes import Processes
from testbed.stack import MODELS

_READY_S = 300.0
_TRAIN_S = 3600.0


class OurSide:
    """Redis and teacher for as long as the context lasts; each `train` is a trainer process of its own."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._opened = ExitStack()
        self._num_runs = 0

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            self._redis = opened.enter_context(EmbeddedRedis(self._folder / "redis"))
            self._processes = opened.enter_context(Processes(log_dir=self._folder / "logs"))
            ready_file = self._folder / "teacher.json"
            arguments = [
                f"model={MODELS / TEACHER}", f"teacher={TEACHER}", f"redis_url={self._redis.url}", "device=cpu",
                "hidden_states.enabled=true", f"torch_threads={max(1, self._plan.cores - 1)}",
            ]  # fmt: skip
            teacher = self._processes.start(
                "teacher", ["-m", "services.teacher_server", *arguments, "--ready-file", str(ready_file)]
            )
            self._processes.wait_until(teacher, ready_file.is_file, _READY_S)
            self._grpc_url = f"grpc://127.0.0.1:{json.loads(ready_file.read_text(encoding='utf-8'))['grpc_port']}"
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def train(self) -> list[dict[str, float]]:
        """One run in a new folder; by step what `metrics.jsonl` says, `step_s` from the last record to this one."""
        self._num_runs += 1
        run_dir = self._folder / f"run{self._num_runs}"
        overrides = self._plan.overrides(run_dir, self._redis.url, *self._plan.further)
        trainer = self._processes.start("trainer", ["-m", "services.trainer", *overrides])
        try:
            code = trainer.process.wait(_TRAIN_S)
        except subprocess.TimeoutExpired:
            raise InternalError(f"the trainer took more than {_TRAIN_S:.0f} s; its log is {trainer.log_path}") from None
        if code != 0:
            raise InternalError(f"the trainer ended with code {code}: {trainer.last_line()}")
        return _measured(read_steps(run_dir))

    def first_loss(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> tuple[float, float]:
        """Loss and norm of the gradient, before clipping, of the untrained student on these rollouts."""
        settings = self._plan.settings(
            self._folder / "first", self._grpc_url,
            "objective.kind=full_vocabulary", "teacher.encoding=float32",
            f"teacher.head_cache={json.dumps(str(self._folder / 'heads'))}",
        )  # fmt: skip
        return _first_loss(settings, _rollouts(prompts, responses))


def _measured(records: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """From the second step on, since the first one's begin is not on record."""
    return [
        {
            "generate_s": record["timing/rollout"],
            "score_s": record["timing/score_wait"],
            "update_s": sum(record[f"timing/{name}"] for name in ("forward_backward", "optimizer", "publish")),
            "step_s": record["time"] - before["time"],
            "num_tokens": record["rollout/response_tokens"],
        }
        for before, record in pairwise(records)
    ]


def _rollouts(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[Rollout]:
    """Without what only the sampler saw, which this objective does not look at."""
    rollouts = []
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        unknown = np.full(len(response), np.nan, dtype=np.float32)
        rollouts.append(
            Rollout(
                rollout_id=f"first.0.{index}",
                group=index,
                prompt_token_ids=np.array(prompt, dtype=np.int32),
                response_token_ids=np.array(response, dtype=np.int32),
                finish_reason=FinishReason.STOP,
                rollout_logprobs=unknown,
                # A request has to name at least one id per position.
                topk_token_ids=np.array(response, dtype=np.int32)[:, None],
                topk_logprobs=unknown[:, None],
                sampled_logprobs=unknown,
                entropy=unknown,
                policy_version=0,
            )
        )
    return rollouts


def _first_loss(settings: Any, rollouts: Sequence[Rollout]) -> tuple[float, float]:
    import torch
    from transformers.utils import logging

    from services.trainer.batch import ScoredRollout, build_batch, micro_batches
    from services.trainer.config import ONLY_TEACHER
    from services.trainer.loss import DistillLoss
    from services.trainer.models import load_model
    from services.trainer.objectives.dispatch import build_objective
    from services.trainer.student import Student
    from services.trainer.teacher_head import TeacherHead
    from services.trainer.teacher_links import build_router, connect_teachers

    logging.disable_progress_bar()
    loaded = load_model(settings.student.model, device="cpu")
    student = Student(loaded.model, num_defined_ids=loaded.num_defined_ids, temperature=settings.rollout.temperature)
    with ExitStack() as opened:
        links = connect_teachers(settings, opened)
        teachers = build_router(settings, links, vocabulary=loaded.vocabulary, student_name=loaded.name)
        teachers.shake_hands(wait_s=_READY_S)
        client: Any = links[ONLY_TEACHER].client
        head = TeacherHead(
            client, lambda: teachers.info(ONLY_TEACHER), folder=settings.teacher.head_cache, device="cpu"
        )
        sent = [(rollout, _Asked(rollout)) for rollout in rollouts]
        replies = [teachers.send(rollout, asked) for rollout, asked in sent]
        scored = [
            ScoredRollout(rollout=rollout, scores=teachers.accept(rollout, asked, reply.result()))
            for (rollout, asked), reply in zip(sent, replies, strict=True)
        ]
        loss = DistillLoss(student, build_objective(settings.objective), settings.objective, head)
        num_tokens = sum(item.num_trained_tokens for item in scored)
        total = 0.0
        for part in micro_batches(scored, settings.student.max_micro_batch_tokens):
            share = loss(build_batch(part)).loss_sum / num_tokens
            share.backward()
            total += float(share.detach())
    norm = torch.nn.utils.get_total_norm([p.grad for p in loaded.model.parameters() if p.grad is not None])
    return total, float(norm)


class _Asked:
    """The prompt of a rollout, which the teacher sees as the student does."""

    teacher = ""

    def __init__(self, rollout: Rollout) -> None:
        self.teacher_prompt_token_ids = rollout.prompt_token_ids
