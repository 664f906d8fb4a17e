"""A step's metrics over all ranks: sums and counts travel, and are joined once, so that a mean weighs tokens alike.

`math.fsum` joins them: the result does not depend on which rank saw what.
"""

import math
from collections.abc import Mapping

from services.trainer.diagnostics.means import Mean, joined
from services.trainer.distributed.ranks import Ranks


def reduce_means(ranks: Ranks, means: Mapping[str, Mean]) -> dict[str, Mean]:
    """Every metric that any rank has, over the ranks that have it; sorted by name."""
    told = ranks.gather({name: [mean.total, mean.count] for name, mean in means.items()})
    names = sorted({name for of_rank in told for name in of_rank})
    return {
        name: joined(Mean(total=of_rank[name][0], count=of_rank[name][1]) for of_rank in told if name in of_rank)
        for name in names
    }


def reduce_counts(ranks: Ranks, counts: Mapping[str, float]) -> dict[str, float]:
    """Sums of counts over all ranks; one that a rank does not name is 0 there."""
    told = ranks.gather(dict(counts))
    names = sorted({name for of_rank in told for name in of_rank})
    return {name: math.fsum(of_rank.get(name, 0.0) for of_rank in told) for name in names}


def slowest(ranks: Ranks, timings_s: Mapping[str, float]) -> dict[str, float]:
    """The longest of each time [s]: a step is as slow as its slowest rank."""
    told = ranks.gather(dict(timings_s))
    return {name: max(of_rank.get(name, 0.0) for of_rank in told) for name in timings_s}
