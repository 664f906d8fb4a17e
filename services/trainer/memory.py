"""Out of memory as a user's error: what it is raised as on each device, and the settings that lower the need."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opd.errors import ConfigError, OpdError, first_line

FOR_START = "use a smaller student.model, or another student.device"
FOR_STEP = (
    "lower student.max_micro_batch_tokens or student.row_chunk, or while sampling rollout.max_slots, and use --resume"
)
FOR_PUBLISHING = (
    "lower rollout.vllm.gpu_memory_utilization or rollout.vllm.kv_cache_bytes, or name another GPU in "
    "rollout.vllm.cuda_devices, and use --resume"
)
FOR_EVALUATION = "lower evaluation.max_response_tokens, evaluation.num_samples or rollout.max_slots, and use --resume"
FOR_COMMAND = "lower --max-slots or --max-response-tokens, use a smaller model, or another --device"

# PyTorch has a type for its own pool on a GPU alone.
_PHRASES = ("DefaultCPUAllocator: ", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no room for what was asked for, on a GPU or in the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # What a service says of its own memory has its own way out.
    if isinstance(error, OpdError):
        return False
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Raises `ConfigError` with this way out where memory runs out; every other error passes."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"the device is out of memory ({first_line(error)}); {advice}") from error
