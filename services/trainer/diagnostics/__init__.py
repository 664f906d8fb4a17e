"""What a step is watched by (paper 2.3, B.1, B.2, 6.2): pure NumPy functions of scores, float64 inside.

`positions.py` packs what is measured, `overlap.py` and `outcomes.py` hold the formulas, `step.py` adds them up over
rollouts in any order and reduces once. A metric that was not measured is absent, never 0.
"""

from services.trainer.diagnostics.means import POSITION_EDGES, BucketMeans, Mean
from services.trainer.diagnostics.positions import PositionScores, position_metrics, positions_of
from services.trainer.diagnostics.step import StepDiagnostics, StepSummary

__all__ = [
    "POSITION_EDGES",
    "BucketMeans",
    "Mean",
    "PositionScores",
    "StepDiagnostics",
    "StepSummary",
    "position_metrics",
    "positions_of",
]
