"""The learning rate of fine-tuning as a share of its peak: linear warm-up, then half a cosine down to 0 (Table 3)."""

import math


def cosine_factor(step: int, num_steps: int, warmup_share: float) -> float:
    """Factor at `step` counted from 0: (step + 1) / warm-up at first, then (1 + cos(pi * share of the rest)) / 2."""
    num_warmup = math.ceil(num_steps * warmup_share)
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))
