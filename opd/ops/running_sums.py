"""Running sums in float64 that may be had on a GPU in a deterministic run."""

import torch
from torch import Tensor


def running_sums(values: Tensor) -> Tensor:
    """The sum of each row's values up to and with each place, along the last dimension, in float64; no gradient.

    PyTorch has no deterministic `cumsum` of fractions on CUDA (a row is scanned by blocks that add up whatever of their
    neighbours is ready) and raises where one is asked for. There, and only there, it is `pairwise_running_sums`.
    """
    values = values.detach()
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return pairwise_running_sums(values)
    return values.cumsum(dim=-1, dtype=torch.float64)


def pairwise_running_sums(values: Tensor) -> Tensor:
    """The same by additions alone, whose order the length fixes: the same bits every time, on every device.

    Spans double: the total of each left half is added to the whole right half. A place that adds nothing therefore
    equals the one before, and sums of nonnegative values never fall. log2 of the length passes, each over half of it.
    """
    sums = values.detach().to(torch.float64, copy=True).contiguous()
    length, half = sums.shape[-1], 1
    while half < length:
        paired = length - length % (2 * half)
        spans = sums[..., :paired].unflatten(-1, (-1, 2, half))
        spans[..., 1, :] += spans[..., 0, -1:]
        # The last span may be short, and then has a right half only if it is longer than the left one.
        sums[..., paired + half :] += sums[..., paired + half - 1 : paired + half]
        half *= 2
    return sums
