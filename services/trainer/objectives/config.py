"""The settings of an objective, refused as a whole when two of them contradict each other.

Unknown keys fail. A setting that the chosen kind would ignore is refused as well when it was given, because a run that
silently drops a setting is not the run that was asked for. Light: no torch.
"""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ObjectiveKind(StrEnum):
    TOP_K = "top_k"
    """Divergence on a small support per position (eq 5)."""
    SAMPLED_TOKEN = "sampled_token"
    """The sampled token alone (eq 3)."""
    FULL_VOCABULARY = "full_vocabulary"
    """Reverse KL over the whole vocabulary (eq 4), from the teacher's hidden states and output head."""


class GradientForm(StrEnum):
    EXACT = "exact"
    """The gradient of the renormalised divergence itself."""
    POLICY = "policy"
    """Each support token pushed by its raw log-ratio, as the paper's reference code does."""


class Support(StrEnum):
    STUDENT = "student"
    TEACHER = "teacher"
    OVERLAP = "overlap"
    NON_OVERLAP = "non_overlap"
    UNION = "union"


class SupportWeight(StrEnum):
    STUDENT = "student"
    TEACHER = "teacher"
    UNIFORM = "uniform"


class Aggregation(StrEnum):
    TOKEN_MEAN = "token_mean"
    """Every trained response position counts the same."""
    SEQUENCE_MEAN = "sequence_mean"
    """Every rollout counts the same, its positions share that."""


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

_TOP_K_ONLY = ("gradient", "support", "weight", "renormalize")


class ObjectiveConfig(BaseModel):
    """Which loss, on which support, at which temperatures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ObjectiveKind = ObjectiveKind.TOP_K
    """`top_k`, `sampled_token` or `full_vocabulary`."""
    gradient: GradientForm = GradientForm.EXACT
    """`exact` moves no mass into or out of the support and is identically 0 on supports of one id; `policy` is not."""
    support: Support = Support.STUDENT
    """Which ids at each position, from the student's and the teacher's `score_top_k` most likely ones."""
    weight: SupportWeight = SupportWeight.STUDENT
    """w(v) of the policy form."""
    renormalize: bool = True
    """Whether w(v) sums to 1 on the support; only the policy form may say no."""
    score_top_k: Annotated[int, Field(ge=1, le=4096)] = 16
    """k of both top-k sets; also of the overlap metrics when the loss needs none."""
    student_temperature: Positive | None = None
    """Divides the student's logits in the loss; unset means the sampling temperature."""
    teacher_temperature: Positive = 1.0
    """Divides the teacher's logits before its normaliser."""
    staleness_cap: Positive | None = None
    """Upper bound of the weight p_learner / p_rollout of each position; unset means no weight."""
    aggregation: Aggregation = Aggregation.TOKEN_MEAN
    """What the loss is a mean over."""

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.kind is ObjectiveKind.SAMPLED_TOKEN:
            self._refuse_ignored(_TOP_K_ONLY, "kind=sampled_token looks at one token and has no support")
        elif self.kind is ObjectiveKind.FULL_VOCABULARY:
            self._refuse_ignored(_TOP_K_ONLY, "kind=full_vocabulary looks at every token and has no support")
        elif self.gradient is GradientForm.EXACT:
            if not self.renormalize:
                raise ValueError(
                    "objective.renormalize=false with gradient=exact is no divergence: "
                    "set renormalize=true or gradient=policy"
                )
            self._refuse_ignored(("weight",), "gradient=exact has no weight to choose")
        self._refuse_other_student_temperature()
        return self

    def _refuse_ignored(self, names: tuple[str, ...], reason: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise ValueError(f"objective.{name}={str(value).lower()} would be ignored, {reason}: remove it")

    def _refuse_other_student_temperature(self) -> None:
        if self.student_temperature is None:
            return
        found = f"objective.student_temperature={self.student_temperature}"
        if self.kind is ObjectiveKind.SAMPLED_TOKEN:
            raise ValueError(
                f"{found} with kind=sampled_token biases the estimate, whose tokens come at the sampling temperature: "
                "leave it unset"
            )
        if self.staleness_cap is not None:
            raise ValueError(
                f"{found} with staleness_cap={self.staleness_cap} would compare probabilities at two temperatures: "
                "leave one of them unset"
            )
