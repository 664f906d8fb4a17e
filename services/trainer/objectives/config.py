"""The settings of an objective, refused as a whole when two of them contradict each other.

Unknown keys fail. A setting that the chosen kind would ignore is refused as well when it was given, because a run that
silently drops a setting is not the run that was asked for. Light: no torch.
"""

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ObjectiveKind(StrEnum):
    """Each is the name of the module of this folder that builds it."""

    TOP_K = "top_k"
    """Divergence on a small support per position (eq 5)."""
    SAMPLED_TOKEN = "sampled_token"
    """The sampled token alone (eq 3)."""
    FULL_VOCABULARY = "full_vocabulary"
    """Divergence over the whole vocabulary (eq 4), from the teacher's hidden states and output head."""
    GRPO = "grpo"
    """Verified answers alone; there is no teacher."""


class GradientForm(StrEnum):
    EXACT = "exact"
    """The gradient of the renormalised divergence itself."""
    POLICY = "policy"
    """Each support token pushed by its raw log-ratio, as the paper's reference code does."""


class Divergence(StrEnum):
    REVERSE_KL = "reverse_kl"
    """KL(student || teacher)."""
    FORWARD_KL = "forward_kl"
    """KL(teacher || student); its default support is the teacher's."""
    JSD = "jsd"
    """The generalised Jensen-Shannon divergence, `beta` KL(q || m) + (1 - `beta`) KL(p || m)."""


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


class Tail(StrEnum):
    DROP = "drop"
    """What is outside the support does not count; both sides are renormalised on it."""
    BUCKET = "bucket"
    """What is outside the support is one more outcome with its mass."""


class Credit(StrEnum):
    LOCAL = "local"
    """A position answers for its own divergence; visited prefixes are constants."""
    TO_GO = "to_go"
    """The sampled token answers for the divergence of all later positions too."""


class Aggregation(StrEnum):
    TOKEN_MEAN = "token_mean"
    """Every trained response position counts the same."""
    SEQUENCE_MEAN = "sequence_mean"
    """Every rollout counts the same, its positions share that."""


class OutcomeRegion(StrEnum):
    ALL = "all"
    """Every response position."""
    BEYOND_HORIZON = "beyond_horizon"
    """Only positions that the teacher's signal does not train."""


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
Discount = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OutcomeConfig(_Part):
    """The reward of verified answers, compared within each prompt's group."""

    weight: NotNegative = 0.0
    """Of -A p(y) / stop_grad(p(y)) at the sampled tokens; 0 leaves the outcome out."""
    region: OutcomeRegion = OutcomeRegion.ALL
    """Which positions it trains."""


class HorizonConfig(_Part):
    """How many leading response positions the teacher's signal trains, and how that number follows reliability."""

    start: Count
    """Positions trained at the first step."""
    growth: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.25
    """Factor by which a step lengthens the horizon where the teacher is reliable at its end; 1 keeps it fixed."""
    reliable_at: Discount = 0.9
    """The teacher is reliable where the overlap ratio of the horizon's last quarter is at least this share of that of
    its first quarter."""
    unreliable_below: UnitInterval = 0.7
    """Below this share the horizon is divided by `growth`, at most back to `start`."""
    min_positions: Count = 256
    """Positions the last quarter has to hold in a step for it to be judged."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.unreliable_below > self.reliable_at:
            raise ValueError(
                f"objective.horizon.unreliable_below={self.unreliable_below} is above reliable_at={self.reliable_at}, "
                "so the horizon would grow and shrink at once: lower it"
            )
        return self


_OF_A_SUPPORT = ("gradient", "support", "weight", "renormalize", "tail")
_OF_A_DIVERGENCE = ("divergence", "beta")
_OF_A_TEACHER = ("teacher_temperature", "credit", "position_discount", "horizon", "outcome")
_IGNORED: dict[ObjectiveKind, tuple[tuple[str, ...], str]] = {
    ObjectiveKind.TOP_K: ((), ""),
    ObjectiveKind.SAMPLED_TOKEN: (
        _OF_A_SUPPORT + _OF_A_DIVERGENCE,
        "kind=sampled_token looks at one token and has no support",
    ),
    ObjectiveKind.FULL_VOCABULARY: (_OF_A_SUPPORT, "kind=full_vocabulary looks at every token and has no support"),
    ObjectiveKind.GRPO: (
        _OF_A_SUPPORT + _OF_A_DIVERGENCE + _OF_A_TEACHER,
        "kind=grpo learns from the outcome alone and has no teacher",
    ),
}


class ObjectiveConfig(_Part):
    """Which loss, on which support, at which temperatures."""

    kind: ObjectiveKind = ObjectiveKind.TOP_K
    """`top_k`, `sampled_token`, `full_vocabulary` or `grpo`."""
    gradient: GradientForm = GradientForm.EXACT
    """`exact` moves no mass into or out of the support and is identically 0 on supports of one id; `policy` is not."""
    divergence: Divergence = Divergence.REVERSE_KL
    """`reverse_kl`, `forward_kl` or `jsd`."""
    beta: UnitInterval = 0.5
    """Of `jsd`: 0 is the forward and 1 the reverse KL."""
    support: Support = Support.STUDENT
    """Which ids at each position, from the student's and the teacher's `score_top_k` most likely ones. With the
    forward KL (`forward_kl`, or `jsd` with `beta=0`) it is the teacher's unless said otherwise."""
    weight: SupportWeight = SupportWeight.STUDENT
    """w(v) of the policy form."""
    renormalize: bool = True
    """Whether w(v) sums to 1 on the support; only the policy form may say no."""
    tail: Tail = Tail.DROP
    """What becomes of the mass outside the support: `drop` or `bucket`."""
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
    credit: Credit = Credit.LOCAL
    """`local`, or `to_go` for the gradient of the whole response's divergence."""
    position_discount: Discount = 1.0
    """The teacher's signal at response position t is multiplied by this to the power of t."""
    horizon: HorizonConfig | None = None
    """Unset has the teacher's signal train whole responses."""
    outcome: OutcomeConfig = Field(default_factory=OutcomeConfig)
    """Mixes in the reward of verified answers."""
    entropy_bonus: NotNegative = 0.0
    """Weight of the student's entropy, which is maximised."""

    @property
    def divergence_beta(self) -> float:
        """The divergence as one number: 0 forward KL, 1 reverse KL, between them the generalised Jensen-Shannon."""
        return {Divergence.FORWARD_KL: 0.0, Divergence.REVERSE_KL: 1.0, Divergence.JSD: self.beta}[self.divergence]

    @property
    def uses_teacher(self) -> bool:
        return self.kind is not ObjectiveKind.GRPO

    @property
    def uses_outcome(self) -> bool:
        """Whether answers are verified and compared within groups."""
        return self.kind is ObjectiveKind.GRPO or self.outcome.weight > 0

    @property
    def estimates_from_samples(self) -> str:
        """The setting that makes the gradient an expectation over the sampled tokens; empty where none does.

        Such a gradient is right only where the loss's student is the very distribution that was sampled from.
        """
        reasons = {
            f"kind={self.kind}": self.kind in (ObjectiveKind.SAMPLED_TOKEN, ObjectiveKind.GRPO),
            "credit=to_go": self.credit is Credit.TO_GO,
            f"outcome.weight={self.outcome.weight}": self.outcome.weight > 0,
        }
        return next((setting for setting, is_set in reasons.items() if is_set), "")

    @model_validator(mode="before")
    @classmethod
    def _choose_support(cls, values: Any) -> Any:
        """The forward KL, also as an end of `jsd`, wants to see what the teacher finds likely."""
        if not isinstance(values, dict) or "support" in values or values.get("kind", "top_k") != "top_k":
            return values
        divergence = values.get("divergence")
        is_forward = divergence == "forward_kl" or (divergence == "jsd" and values.get("beta") == 0)
        return values | {"support": Support.TEACHER} if is_forward else values

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        self._refuse_ignored(*_IGNORED[self.kind])
        if self.kind is ObjectiveKind.TOP_K:
            self._check_gradient()
        if self.divergence is not Divergence.JSD:
            self._refuse_ignored(("beta",), f"divergence={self.divergence} has none")
        if self.outcome.region is OutcomeRegion.BEYOND_HORIZON and not (self.horizon and self.outcome.weight):
            raise ValueError(
                "objective.outcome.region=beyond_horizon needs a horizon and a weight: "
                "set objective.horizon.start and objective.outcome.weight"
            )
        self._refuse_other_student_temperature()
        return self

    def _check_gradient(self) -> None:
        if self.gradient is GradientForm.POLICY:
            self._refuse_ignored((*_OF_A_DIVERGENCE, "tail"), "gradient=policy is a form of the reverse KL on S alone")
            return
        if not self.renormalize:
            raise ValueError(
                "objective.renormalize=false with gradient=exact is no divergence: "
                "set renormalize=true or gradient=policy"
            )
        self._refuse_ignored(("weight",), "gradient=exact has no weight to choose")

    def _refuse_ignored(self, names: tuple[str, ...], reason: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"objective.{name}={str(value).lower()} would be ignored, {reason}: remove it")

    def _refuse_other_student_temperature(self) -> None:
        if self.student_temperature is None:
            return
        found = f"objective.student_temperature={self.student_temperature}"
        if self.estimates_from_samples:
            raise ValueError(
                f"{found} with {self.estimates_from_samples} biases the estimate, whose tokens come at the sampling "
                "temperature: leave it unset"
            )
        if self.staleness_cap is not None:
            raise ValueError(
                f"{found} with staleness_cap={self.staleness_cap} would compare probabilities at two temperatures: "
                "leave one of them unset"
            )
