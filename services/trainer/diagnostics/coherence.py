"""Whether rollouts pull the weights the same way (6.2: gradients that cancel may be why a good reward teaches nothing).

n rollouts, g_i the gradient that rollout i contributes to the step. Coherence is |mean g_i| / mean |g_i|: 1 when all
point one way, about 1 / sqrt(n) when they are orthogonal, 0 when they cancel.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def gradient_coherence(losses: Iterable[Callable[[], Tensor]], parameters: Sequence[Tensor]) -> float | None:
    """Coherence of the gradients of scalar `losses`, each computed when its turn comes.

    Holds one gradient and one sum of gradients at a time, leaves `.grad` alone, and takes norms in float64. None when
    no loss has a gradient, so that nothing can be divided by.
    """
    sums: list[Tensor | None] = [None] * len(parameters)
    norms: list[float] = []
    for loss in losses:
        gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
        norms.append(gradient_norm(gradients))
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                # Not in place into what autograd gave: it may share memory with the graph's own buffers.
                before = sums[index]
                sums[index] = gradient if before is None else before + gradient
    total = math.fsum(norms)
    # The number of rollouts cancels out of the two means.
    return gradient_norm(sums) / total if total > 0 else None


def gradient_norm(gradients: Sequence[Tensor | None]) -> float:
    """Of all together as one vector, in float64; one that is None counts as 0."""
    # The dtype is that of the sum: no copy of a whole gradient in float64 is made.
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients if gradient is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
