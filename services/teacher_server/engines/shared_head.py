"""The output head as bytes to be handed out: once per process, hashed once, on the host.

V rows of the head, H hidden size. On the CPU the bytes are the weight's own memory; from a GPU they are copied once.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from opd.errors import ConfigError
from opd.ops import OutputHead
from opd.types import SharedHead


def share_head(head: OutputHead) -> SharedHead:
    """Weight and bias as row-major little-endian bytes in their stored dtype; ConfigError when theirs differ."""
    if head.bias_V is not None and head.bias_V.dtype != head.weight_VH.dtype:
        raise ConfigError(
            f"hidden_states.enabled=true: the output head's bias is {head.bias_V.dtype} and its weight "
            f"{head.weight_VH.dtype}, which travel in one dtype; leave hidden states off for this model"
        )
    weight = _bytes_of(head.weight_VH)
    bias = b"" if head.bias_V is None else _bytes_of(head.bias_V).tobytes()
    digest = hashlib.sha256(weight)
    digest.update(bias)
    num_rows, hidden_size = head.weight_VH.shape
    return SharedHead(
        weight=weight,
        bias=bias,
        shape=(num_rows, hidden_size),
        dtype=str(head.weight_VH.dtype).removeprefix("torch."),
        sha256=digest.hexdigest(),
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    flat: np.ndarray = tensor.detach().contiguous().cpu().view(torch.uint8).flatten().numpy()
    return memoryview(flat).toreadonly()
