"""The training loop of the testbed: AdamW, warm-up and cosine, checkpoints without pickle.

A checkpoint is a folder with tensors (safetensors) and a JSON state. Training goes on from the last complete
checkpoint with the same batches it would have seen, so an interrupted run ends as an uninterrupted one does.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from opd.files import whole_file
from testbed.batches import Batch, Position

STATE_FILE = "state.json"
TENSOR_FILE = "tensors.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How long and how fast to train; the rate falls by cosine to final_share of its peak."""

    updates: int
    learning_rate: float
    warmup: int = 100
    final_share: float = 0.02
    max_tokens: int = 4096
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    max_norm: float = 1.0
    checkpoint_every: int = 100

    def rate(self, update: int) -> float:
        if update < self.warmup:
            return self.learning_rate * (update + 1) / self.warmup
        done = (update - self.warmup) / max(1, self.updates - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.learning_rate * (self.final_share + (1 - self.final_share) * cosine)


@dataclass(kw_only=True, slots=True)
class Progress:
    """Where a training run stands; written to the checkpoint as JSON."""

    update: int = 0
    chunk: int = 0
    offset: int = 0
    trained_tokens: int = 0
    seen_tokens: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out_losses: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def from_json(cls, text: str) -> Progress:
        """Read back what a checkpoint holds; JSON knows no tuples."""
        state = json.loads(text)
        for name in ("losses", "held_out_losses"):
            state[name] = [(update, loss) for update, loss in state[name]]
        return cls(**state)


def batch_loss(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy over the trained positions; logits are made for those positions only."""
    hidden_BTD = model.model(
        input_ids=batch.ids_BT, attention_mask=batch.mask_B1TT, position_ids=batch.positions_BT, use_cache=False
    ).last_hidden_state
    logits_NV = model.lm_head(hidden_BTD.flatten(0, 1)[batch.sources_N])
    return F.cross_entropy(logits_NV, batch.ids_BT.flatten()[batch.targets_N])


@torch.no_grad()
def mean_loss(model: Qwen3ForCausalLM, batches: list[Batch]) -> float:
    """Mean cross-entropy per trained token over fixed batches."""
    sizes = [len(batch.targets_N) for batch in batches]
    losses = [batch_loss(model, batch).item() for batch in batches]
    return sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)


def make_optimizer(model: Qwen3ForCausalLM, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=schedule.betas)


def _named(model: Qwen3ForCausalLM, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"optimizer.{key}.{names[id(parameter)]}": value for key, value in state.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def save_checkpoint(folder: Path, model: Qwen3ForCausalLM, optimizer: torch.optim.AdamW, progress: Progress) -> None:
    """Write tensors under the update's own name, then the state that points at them: a cut never mixes two."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = folder / f"{progress.update}-{TENSOR_FILE}"
    save_file(_named(model, optimizer), tensors)
    with whole_file(folder / STATE_FILE) as partial:
        partial.write_text(json.dumps(asdict(progress)), encoding="utf-8")
    for old in folder.glob(f"*-{TENSOR_FILE}"):
        if old != tensors:
            old.unlink()


def load_checkpoint(folder: Path, model: Qwen3ForCausalLM, optimizer: torch.optim.AdamW) -> Progress:
    """Restore the last checkpoint in place; without one, the start."""
    if not (folder / STATE_FILE).exists():
        return Progress()
    progress = Progress.from_json((folder / STATE_FILE).read_text(encoding="utf-8"))
    tensors = load_file(folder / f"{progress.update}-{TENSOR_FILE}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            state = {key: tensors.get(f"optimizer.{key}.{name}") for key in keys}
            if state["step"] is not None:
                optimizer.state[parameter] = state
    return progress


def _update(
    model: Qwen3ForCausalLM, optimizer: torch.optim.AdamW, batch: Batch, schedule: Schedule, rate: float
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = batch_loss(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.max_norm, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def train(
    model: Qwen3ForCausalLM,
    schedule: Schedule,
    batches: Callable[[Position], Iterator[Batch]],
    folder: Path,
    held_out: list[Batch],
    report: Callable[[Progress], None],
) -> Progress:
    """Train to the end of the schedule from wherever the folder's checkpoint stands."""
    optimizer = make_optimizer(model, schedule)
    progress = load_checkpoint(folder, model, optimizer)
    stream = batches(Position(chunk=progress.chunk, offset=progress.offset))
    model.train()
    while progress.update < schedule.updates:
        started = time.monotonic()
        batch = next(stream)
        loss = _update(model, optimizer, batch, schedule, schedule.rate(progress.update))
        progress.update += 1
        progress.chunk, progress.offset = batch.after.chunk, batch.after.offset
        progress.trained_tokens += len(batch.targets_N)
        progress.seen_tokens += batch.ids_BT.numel()
        progress.losses.append((progress.update, round(loss, 4)))
        is_last = progress.update == schedule.updates
        if is_last or progress.update % schedule.checkpoint_every == 0:
            progress.held_out_losses.append((progress.update, round(mean_loss(model, held_out), 5)))
            progress.seconds += time.monotonic() - started
            save_checkpoint(folder, model, optimizer, progress)
        else:
            progress.seconds += time.monotonic() - started
        report(progress)
    return progress
