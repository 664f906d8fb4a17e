"""One rank of a small training run on recorded rollouts, alone or under torchrun; rank 0 writes what came of it.

`sharded_worker.py FOLDER OUT FIRST LAST [--kill|--fail|--hang|--leave RANK]`: FOLDER has a model, `plan.json` and a
file of scored rollouts for each step, OUT gets `result.json` and checkpoints; a checkpoint that is there already is
gone on from.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from opd.errors import NonFiniteError, OpdError
from opd.settings import check_settings
from services.trainer.batch import micro_batches
from services.trainer.checkpoint import Checkpoint, CheckpointStore, TrainerState
from services.trainer.config import OptimSettings, TrainSettings
from services.trainer.distributed.process_group import RankEnvironment, TorchRanks, joined_ranks
from services.trainer.distributed.ranks import Ranks, together
from services.trainer.distributed.saving import save_together
from services.trainer.distributed.sharding import shard_student
from services.trainer.distributed.share import Share
from services.trainer.distributed.step_scope import step_scope
from services.trainer.lora import Adapter
from services.trainer.loss import DistillLoss
from services.trainer.models import LoadedModel
from services.trainer.objectives.config import ObjectiveConfig
from services.trainer.objectives.dispatch import build_objective
from services.trainer.probe import read_probe
from services.trainer.step_gradient import StepGradient
from services.trainer.student import Student, StudentOptimizer
from services.trainer.student_start import open_student

MICRO_BATCH_TOKENS = 40


class Worker:
    """What the trainer is made of, without prompts, engine and teachers."""

    def __init__(self, ranks: Ranks, folder: Path, out: Path) -> None:
        plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
        self.ranks, self.folder = ranks, folder
        self.store = CheckpointStore(out / "checkpoints", keep_last=9)
        self.checkpoint: Checkpoint | None = self.store.latest()
        self.loaded, self.adapter = self._open(plan.get("lora"))
        if isinstance(ranks, TorchRanks):
            shard_student(self.loaded.model, ranks.mesh)
        self.student = Student(
            self.loaded.model,
            num_defined_ids=self.loaded.num_defined_ids,
            row_chunk=5,
            gradient_checkpointing=plan["gradient_checkpointing"],
        )
        self.optimizer = StudentOptimizer(self.loaded.model, OptimSettings(lr=1e-3, max_grad_norm=plan["max_norm"]))
        if self.checkpoint is not None:
            self.optimizer.load_state_tensors(self.checkpoint.optimizer_tensors())
        config = ObjectiveConfig(**plan["objective"])
        self.loss = DistillLoss(self.student, build_objective(config), config)
        self.scope = step_scope(ranks, self.student, reduces_each_round=plan["reduces_each_round"])

    def _open(self, lora: dict[str, Any] | None) -> tuple[LoadedModel, Adapter | None]:
        """As a run does: adapters go on from their base."""
        student = {"model": str(self.folder / "model"), "device": "cpu", "lora": lora}
        settings = check_settings(TrainSettings, {"student": student, "data": {"files": ["none"]}})
        return open_student(settings, self.checkpoint)

    def train(self, step: int) -> dict[str, Any]:
        """One optimizer step on this rank's share of the recorded rollouts."""
        scored = read_probe(self.folder / f"rollouts-{step}.npz").rollouts
        share = Share(rank=self.ranks.rank, num_ranks=self.ranks.num_ranks)
        groups = share.prompts(1 + max(item.rollout.group for item in scored))
        mine = [item for item in scored if item.rollout.group in groups]
        gradient = StepGradient(
            self.student, self.loss, self.optimizer, max_tokens=MICRO_BATCH_TOKENS, scope=self.scope
        )
        gradient.hold(mine)
        means = gradient.finish()
        norm = self.optimizer.clip()
        self.optimizer.step(step)
        return {
            "losses": {name: mean.value for name, mean in means.items()},
            "norm": norm,
            "micro_batches": self.ranks.gather(len(micro_batches(mine, MICRO_BATCH_TOKENS))),
        }

    def save(self, step: int) -> None:
        state = TrainerState(step=step, seed=0, prompts_digest="d", config={})
        loaded, adapter = self.loaded, self.adapter
        save_together(self.ranks, self.store, loaded.model, loaded.tokenizer, self.optimizer, state, adapter=adapter)

    def leave(self, step: int) -> None:
        """Runs out of memory alone, and saves what is complete, as a run does."""
        with contextlib.suppress(torch.OutOfMemoryError), self.scope.micro_batch(is_last=True):
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        self.save(step)


def main() -> int:
    folder, out, first, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    event, whom = (sys.argv[5], int(sys.argv[6])) if len(sys.argv) > 5 else ("", -1)
    torch.manual_seed(0)
    try:
        with joined_ranks(RankEnvironment.read(), device="cpu", timeout_s=60, silence_s=5) as ranks:
            (out / f"pid-{ranks.rank}").write_text(str(os.getpid()))
            worker = Worker(ranks, folder, out)
            steps = []
            for step in range(first, last):
                with together(ranks):
                    _happen(event if ranks.rank == whom and step == 1 else "")
                if event == "--leave" and ranks.rank == whom and step == 1:
                    worker.leave(step)
                steps.append(worker.train(step))
                worker.save(step + 1)
            if ranks.rank == 0:
                (out / "result.json").write_text(json.dumps(steps))
    except OpdError as error:
        sys.stderr.write(f"{type(error).__name__}: {error.message}\n")
        return 1
    return 0


def _happen(event: str) -> None:
    if event == "--kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "--fail":
        raise NonFiniteError("rollout r-1 has a score that is not finite")
    if event == "--hang":
        time.sleep(600)


if __name__ == "__main__":
    # Without clean-up by the interpreter: what a torn process group has left behind may wait for ever.
    code = main()
    sys.stderr.flush()
    os._exit(code)
