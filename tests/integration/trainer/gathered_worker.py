"""One rank of a run whose rollouts are completed by the trainer and whose weights are published as files.

`gathered_worker.py MODEL TEACHER OUT [--refuse RANK]`: two steps on three prompts, so that of two ranks one has twice
the rollouts of the other. Each rank writes `rank-N.json` and keeps its version folders; the one named has nowhere to
write its second version.
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from opd.errors import OpdError
from opd.types import Rollout, ScoreRequest
from services.trainer.batch import ScoredRollout
from services.trainer.checkpoint import CheckpointStore, TrainerState
from services.trainer.config import OptimSettings
from services.trainer.distributed.process_group import RankEnvironment, TorchRanks, joined_ranks
from services.trainer.distributed.publishing import PublishedByAll, worst_of_all
from services.trainer.distributed.ranks import Ranks
from services.trainer.distributed.saving import save_together
from services.trainer.distributed.sharding import gathered, shard_student
from services.trainer.distributed.step_scope import step_scope
from services.trainer.loss import DistillLoss
from services.trainer.models import load_model
from services.trainer.objectives.config import ObjectiveConfig
from services.trainer.objectives.dispatch import build_objective
from services.trainer.rollout.base import SamplingParams
from services.trainer.rollout.completed import CompletedRollouts
from services.trainer.rollout.transformers_engine import TransformersEngine
from services.trainer.rollout.vllm_files import VersionFolder
from services.trainer.step_gradient import StepGradient
from services.trainer.student import Student, StudentOptimizer
from services.trainer.support_pass import SupportPass
from tests.unit.trainer.tiny_training import exact_scores, step_requests

NUM_PROMPTS, PER_PROMPT, K = 3, 2, 6


class KeptVersions:
    """A `WeightPublisher` for an engine that never takes a version up."""

    def __init__(self, model: Any, folder: VersionFolder) -> None:
        self._model = model
        self._folder = folder

    def publish(self, policy_version: int) -> None:
        self._folder.write(self._model, policy_version, torch.float32)


class Worker:
    """What a run is made of, with a teacher that answers at once."""

    def __init__(self, ranks: Ranks, model: str, teacher: str, out: Path) -> None:
        self.ranks = ranks
        self.teacher = load_model(teacher, device="cpu").model
        self.loaded = load_model(model, device="cpu")
        if isinstance(ranks, TorchRanks):
            shard_student(self.loaded.model, ranks.mesh)
        self.student = Student(self.loaded.model, num_defined_ids=self.loaded.num_defined_ids)
        self.optimizer = StudentOptimizer(self.loaded.model, OptimSettings(lr=1e-2), in_step=ranks.in_step)
        config = ObjectiveConfig(score_top_k=K)
        self.loss = DistillLoss(self.student, build_objective(config), config)
        self.scope = step_scope(ranks, self.student)
        with gathered(self.loaded.model, ranks):
            bare = TransformersEngine(
                self.loaded.model,
                eos_token_ids=self.loaded.eos_token_ids,
                num_defined_ids=self.loaded.num_defined_ids,
                score_top_k=None,
            )
        self.engine = CompletedRollouts(bare, SupportPass(student=self.student, score_top_k=K))
        self.folder = VersionFolder(out)
        self.weights = PublishedByAll(KeptVersions(self.loaded.model, self.folder), self.loaded.model, ranks)
        self.store = CheckpointStore(out / "checkpoints", keep_last=9)

    def sample(self, step: int) -> list[Rollout]:
        mine = self.scope.share.rollouts(NUM_PROMPTS, PER_PROMPT)
        requests = step_requests(step, mine, num_prompts=NUM_PROMPTS, per_prompt=PER_PROMPT)
        with self.scope.sampling(nullcontext):
            return self.engine.sample(requests, SamplingParams(max_response_tokens=12))

    def train(self, rollouts: list[Rollout], step: int) -> float:
        gradient = StepGradient(self.student, self.loss, self.optimizer, max_tokens=40, scope=self.scope)
        gradient.hold([self._scored(rollout) for rollout in rollouts])
        gradient.finish()
        norm = self.optimizer.clip()
        self.optimizer.step(step)
        return norm

    def save(self, step: int) -> None:
        state = TrainerState(step=step, seed=0, prompts_digest="d", config={})
        save_together(self.ranks, self.store, self.loaded.model, self.loaded.tokenizer, self.optimizer, state)

    def _scored(self, rollout: Rollout) -> ScoredRollout:
        request = ScoreRequest(
            rollout_id=rollout.rollout_id,
            tenant="t",
            teacher="t",
            prompt_token_ids=rollout.prompt_token_ids,
            response_token_ids=rollout.response_token_ids,
            candidate_token_ids=rollout.topk_token_ids,
            score_top_k=K,
        )
        return ScoredRollout(rollout=rollout, scores=exact_scores(self.teacher, request))


def run(worker: Worker, *, refuses: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"rollouts": {}, "norms": [], "error": "", "folder": str(worker.folder.path)}
    for step in range(2):
        rollouts = worker.sample(step)
        for rollout in rollouts:
            numbers = (rollout.response_token_ids, rollout.topk_token_ids, rollout.entropy, rollout.sampled_logprobs)
            found["rollouts"][rollout.rollout_id] = [values.tolist() for values in numbers]
        found["norms"].append(worker.train(rollouts, step))
        if refuses and step == 1:
            worker.folder.close()
        try:
            worker.weights.publish(step + 1)
        except OpdError as error:
            found["error"] = f"{type(error).__name__}: {error.message}"
        found["in_shards"] = all(isinstance(parameter, DTensor) for parameter in worker.loaded.model.parameters())
        worker.save(step + 1)
    return found


def main() -> int:
    model, teacher, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    refusing = int(sys.argv[5]) if len(sys.argv) > 4 else -1
    torch.manual_seed(0)
    try:
        with joined_ranks(RankEnvironment.read(), device="cpu", timeout_s=60, silence_s=20) as ranks:
            found = run(Worker(ranks, model, teacher, out), refuses=ranks.rank == refusing)
            drift = [0.5, float("nan")][ranks.rank]
            found["worst"] = worst_of_all(ranks, lambda: {"rank": float(ranks.rank), "drift": drift})()
            (out / f"rank-{ranks.rank}.json").write_text(json.dumps(found))
    except OpdError as error:
        sys.stderr.write(f"{type(error).__name__}: {error.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    # Without clean-up by the interpreter: what a torn process group has left behind may wait for ever.
    code = main()
    sys.stderr.flush()
    os._exit(code)
