"""Checkpoints of a run over several ranks: rank 0 writes whole tensors, in the same form as a run of one process.

So a checkpoint knows nothing of how many ranks wrote it, and any other number goes on with it. Adapters are merged into
the whole copy, in fp32.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from services.trainer.checkpoint import CheckpointStore, TrainerState
from services.trainer.distributed.ranks import Ranks, together
from services.trainer.distributed.sharding import is_sharded, whole_on_host, whole_weights
from services.trainer.lora import Adapter
from services.trainer.student import StudentOptimizer
from services.trainer.student_start import adapted


def save_together(
    ranks: Ranks,
    store: CheckpointStore,
    model: Any,
    tokenizer: Any,
    optimizer: StudentOptimizer,
    state: TrainerState,
    extra: dict[str, dict[str, Tensor]] | None = None,
    adapter: Adapter | None = None,
) -> Path:
    """Collective; the folder. A disk that refuses is the same `CheckpointError` on all ranks.

    `RankLostError`, and nothing saved, once one of them has left the others.
    """
    if not is_sharded(model):
        return store.save(model, tokenizer, optimizer.state_tensors(), state, extra, **adapted(model, adapter))
    is_writer = ranks.rank == 0
    with ranks.in_step():
        weights = whole_weights(model, keeps=is_writer)
        tensors = whole_on_host(optimizer.state_tensors(), keeps=is_writer)
    folder = ""
    with together(ranks):
        if is_writer:
            folder = str(store.save(model, tokenizer, tensors, state, extra, **adapted(model, adapter, weights)))
    return Path(ranks.gather(folder)[0])
