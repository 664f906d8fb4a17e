"""One student over many GPUs: processes that torchrun started, one a GPU, called ranks.

Read in this order: `ranks.py` (what a rank can ask the others, and the single process that asks nobody),
`step_scope.py` (how the work of all ranks becomes one step), `sharding.py` (weights cut into shards and put together
again), `process_group.py` and `watch.py` (how ranks find each other and end together), `pins.py`, `share.py` and
`means.py` (the teacher of a step, who samples which prompts, and metrics over all), `publishing.py` (weights for
engines of their own).
"""
