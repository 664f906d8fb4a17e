"""What a figure shows, as descriptions; `drawing.py` puts them on paper. Light: no matplotlib."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from experiments.findings import Findings


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A training metric over steps: mean over seeds, and where arms are few a band from lowest to highest seed."""

    metric: str
    title: str
    y_label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracies:
    """Held-out accuracy of every arm with its interval, between the student before and the teacher."""

    title: str = "Held-out accuracy, avg@16"


@dataclass(frozen=True, kw_only=True, slots=True)
class ByLevel:
    """Held-out accuracy by level of difficulty, which is what the testbed has for benchmarks; mean over seeds."""

    title: str = "Held-out accuracy by level"


@dataclass(frozen=True, kw_only=True, slots=True)
class ByPosition:
    """A metric by position in the response, at the first steps dotted and at the last ones solid."""

    metric: str
    title: str
    y_label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Custom:
    """Whatever else; `draw` is given matplotlib axes and the findings, and draws nothing where it has no data."""

    draw: Callable[[Any, Findings], None]
    title: str
    x_label: str
    y_label: str


Panel: TypeAlias = Curve | Accuracies | ByLevel | ByPosition | Custom

TRAINING_ACCURACY = Curve(metric="outcome/accuracy", title="Accuracy of training rollouts", y_label="fraction correct")
OVERLAP = Curve(metric="distill/overlap_ratio", title="Overlap ratio (eq 6)", y_label="shared ids / k")
ADVANTAGE = Curve(metric="distill/overlap_advantage", title="Overlap-token advantage (eq 7)", y_label="nats per token")
ENTROPY_GAP = Curve(metric="distill/entropy_gap", title="Entropy gap (eq 8)", y_label="nats")
STUDENT_ENTROPY = Curve(metric="distill/entropy_student", title="Student entropy", y_label="nats")
STUDENT_MASS = Curve(metric="distill/overlap_mass_student", title="Student mass on the overlap", y_label="probability")
TEACHER_MASS = Curve(metric="distill/overlap_mass_teacher", title="Teacher mass on the overlap", y_label="probability")
GRADIENT_NORM = Curve(metric="optim/grad_norm", title="Gradient norm before clipping", y_label="L2 norm")
LOSS = Curve(metric="loss/reverse_kl", title="Reverse KL on the student's top k (eq 5)", y_label="nats per position")
EXTREME_GAP = Curve(
    metric="distill/extreme_prob_gap_abs", title="Most extreme token, student minus teacher", y_label="probability"
)
LENGTH = Curve(metric="rollout/response_length", title="Response length", y_label="tokens")
