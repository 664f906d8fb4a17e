"""From numbers to verdicts: pure functions, one rule each, with its place in the paper.

A rule says `yes` or `no` only where a whole 95 % interval lies on one side of its threshold, otherwise `unclear`. What
cannot be told is not guessed: without a pilot run nobody knows whether a teacher knows something new (3.2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from services.trainer.evaluation.estimates import Estimate
from services.trainer.recipes.preflight.settings import Thresholds


class Verdict(StrEnum):
    YES = "yes"
    NO = "no"
    UNCLEAR = "unclear"
    """The interval holds the threshold, or rules contradict each other."""
    CANNOT_BE_TOLD = "cannot be told"
    """What would tell it was not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One number held against one threshold."""

    name: str
    estimate: Estimate
    threshold: float
    verdict: Verdict
    """`yes` speaks for the condition, `no` against it."""
    section: str
    """Of the paper, or empty for a rule of our own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """A verdict with everything it rests on."""

    verdict: Verdict
    evidence: tuple[Evidence, ...]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PilotSlopes:
    """Change per step over a short training run; None for a curve that was not measured or is too short."""

    num_steps: int
    reverse_kl: Estimate | None
    overlap_ratio: Estimate | None
    accuracy: Estimate | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What is known of one teacher when the teachers are ranked."""

    name: str
    is_refused: bool
    compatible: Judgement | None
    new_knowledge: Judgement | None
    gap: Estimate | None
    """Accuracy of the teacher minus the student's; None where the teacher cannot be sampled."""
    overlap_mass: Estimate | None
    """For the order of what is otherwise equal (3.1)."""
    pilot_accuracy: Estimate | None = None
    """Per step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranked:
    """A teacher's place, 1 the best, and why."""

    name: str
    place: int
    predicted: str
    """`gain`, `possible gain`, `little`, `risky` or `none`."""
    reason: str


def above(name: str, estimate: Estimate, threshold: float, section: str) -> Evidence:
    """`yes` where the interval lies at or above the threshold, `no` where it lies below."""
    verdict = Verdict.UNCLEAR
    if estimate.low >= threshold:
        verdict = Verdict.YES
    elif estimate.high < threshold:
        verdict = Verdict.NO
    return Evidence(name=name, estimate=estimate, threshold=threshold, verdict=verdict, section=section)


def below(name: str, estimate: Estimate, threshold: float, section: str) -> Evidence:
    """`yes` where the interval lies at or below the threshold, `no` where it lies above."""
    mirrored = above(name, _negated(estimate), -threshold, section)
    return Evidence(name=name, estimate=estimate, threshold=threshold, verdict=mirrored.verdict, section=section)


def _negated(estimate: Estimate) -> Estimate:
    return Estimate(value=-estimate.value, low=-estimate.high, high=-estimate.low)


def judge_compatibility(metrics: Mapping[str, Estimate], limits: Thresholds) -> Judgement:
    """Condition 1: compatible thinking patterns (3.1).

    `no` when the shared tokens lack mass (C.2), the sets that hold 0.99 differ, or the entropies do (4.1). `yes` when
    both masses are high (B.1) and either the ratio or the 0.99 sets agree. AUROC, KL and advantage decide nothing: a
    failing run may have the smaller loss (B.2) and as good a reward (6.2).
    """
    masses = [
        above(f"overlap mass, {side}", metrics[f"overlap_mass_{side}"], limits.overlap_mass, "4.1, B.1")
        for side in ("student", "teacher")
    ]
    low_masses = [
        above(f"overlap mass, {side}, at least", metrics[f"overlap_mass_{side}"], limits.low_overlap_mass, "C.2")
        for side in ("student", "teacher")
    ]
    ratio = above("overlap ratio", metrics["overlap_ratio"], limits.overlap_ratio, "3.1, 4.1")
    sets = above("agreement of 99 % sets", metrics["mass99_overlap"], limits.mass99_overlap, "")
    vetoes = [*low_masses, sets]
    if "entropy_gap_share" in metrics:
        vetoes.append(
            below("entropy gap / student entropy", metrics["entropy_gap_share"], limits.entropy_gap_share, "4.1")
        )
    evidence = (*masses, ratio, *vetoes)
    against = [item.name for item in vetoes if item.verdict is Verdict.NO]
    if against:
        return Judgement(verdict=Verdict.NO, evidence=evidence, reason=f"low: {', '.join(against)}")
    agrees = Verdict.YES in (ratio.verdict, sets.verdict)
    if agrees and all(item.verdict is Verdict.YES for item in masses):
        return Judgement(verdict=Verdict.YES, evidence=evidence, reason="shared tokens hold nearly all of both models")
    open_ones = [item.name for item in (*masses, ratio, sets) if item.verdict is not Verdict.YES]
    return Judgement(verdict=Verdict.UNCLEAR, evidence=evidence, reason=f"not settled: {', '.join(open_ones)}")


def judge_new_knowledge(pilot: PilotSlopes | None, limits: Thresholds) -> Judgement:
    """Condition 2: something new to the student (3.2), told by a pilot alone.

    `yes` when accuracy rises while the student comes closer (KL falls); `no` when accuracy does not rise although it
    comes closer. Accuracy that rises while KL does not fall is no sign yet: alignment is what marks a run that works
    (4.1).
    """
    if pilot is None:
        return _untold("no pilot was run (--pilot-steps)")
    if pilot.accuracy is None or pilot.reverse_kl is None:
        missing = "answers are not known" if pilot.accuracy is None and pilot.reverse_kl else "it is too short"
        return _untold(f"the pilot has no slopes: {missing}")
    rises = above("accuracy per step", pilot.accuracy, limits.accuracy_slope, "3.2")
    falls = below("reverse KL per step", pilot.reverse_kl, 0.0, "4.1, B.2")
    evidence = [rises, falls]
    if pilot.overlap_ratio is not None:
        evidence.append(above("overlap ratio per step", pilot.overlap_ratio, 0.0, "4.1"))
    verdict, reason = Verdict.UNCLEAR, "the pilot's curves are within their noise"
    if rises.verdict is Verdict.YES and falls.verdict is Verdict.YES:
        verdict, reason = Verdict.YES, "accuracy rises while the student comes closer"
    elif rises.verdict is Verdict.YES:
        reason = "accuracy rises, but the student comes no closer: run a longer pilot"
    elif falls.verdict is Verdict.YES:
        verdict = Verdict.NO if rises.verdict is Verdict.NO else Verdict.UNCLEAR
        reason = "the student comes closer, and accuracy does not rise"
    elif rises.verdict is Verdict.NO:
        verdict, reason = Verdict.NO, "accuracy falls"
    return Judgement(verdict=verdict, evidence=tuple(evidence), reason=reason)


def _untold(reason: str) -> Judgement:
    return Judgement(verdict=Verdict.CANNOT_BE_TOLD, evidence=(), reason=reason)


def rank(candidates: Sequence[Candidate], limits: Thresholds) -> list[Ranked]:
    """Best first by predicted gain; among equals by the pilot's accuracy, then the gap, then the overlap mass."""
    predicted = [(candidate, *predict(candidate, limits)) for candidate in candidates]
    order = sorted(predicted, key=lambda item: (_ORDER.index(item[1]), *_tie_break(item[0])))
    return [
        Ranked(name=candidate.name, place=place, predicted=prediction, reason=reason)
        for place, (candidate, prediction, reason) in enumerate(order, start=1)
    ]


_ORDER = ("gain", "possible gain", "little", "risky", "none")


def _tie_break(candidate: Candidate) -> tuple[float, float, float]:
    found = (candidate.pilot_accuracy, candidate.gap, candidate.overlap_mass)
    slope, gap, mass = (-estimate.value if estimate is not None else 0.0 for estimate in found)
    return slope, gap, mass


def predict(candidate: Candidate, limits: Thresholds) -> tuple[str, str]:
    """The predicted gain and its reason, by both conditions and by what there is to gain.

    An incompatible teacher comes after one that has nothing to teach: pulling towards other patterns costs what the
    student can do (3.1, 3.3), copying an equal costs nothing.
    """
    compatible, knowledge, gap = candidate.compatible, candidate.new_knowledge, candidate.gap
    if candidate.is_refused or compatible is None:
        return "none", "the handshake refuses it"
    if compatible.verdict is Verdict.NO:
        return "risky", f"patterns do not fit (3.1): {compatible.reason}"
    if gap is not None and gap.high < limits.accuracy_gap:
        return "little", "it is no better than the student (3.2)"
    known = knowledge.verdict if knowledge is not None else Verdict.CANNOT_BE_TOLD
    if known is Verdict.NO:
        return "little", f"nothing new (3.2): {knowledge.reason if knowledge else ''}"
    if known is Verdict.YES:
        certain = "gain" if compatible.verdict is Verdict.YES else "possible gain"
        return certain, "patterns fit, and the pilot gains" if certain == "gain" else "the pilot gains; fit not settled"
    if gap is not None and gap.low <= limits.accuracy_gap:
        return "little", "its lead over the student is within the noise (3.2)"
    if compatible.verdict is Verdict.YES:
        return "possible gain", "patterns fit; whether it has something new, only a pilot tells (3.2)"
    return "possible gain", f"patterns {compatible.reason}; and only a pilot tells what is new (3.2)"


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateChange:
    """A template against the prompts as they are, on the same problems: template minus as-is."""

    overlap_ratio: Estimate
    overlap_mass: Estimate
    """Mean of the student's and the teacher's."""
    reverse_kl: Estimate


def judge_templates(changes: Mapping[str, TemplateChange], as_is: str) -> tuple[str | None, str]:
    """Which way of asking aligns best (5.2, Fig 9: the aligned template begins with the higher overlap ratio).

    A template is named where its ratio rises for certain while the mass does not fall for certain, `as_is` where all
    others lower the ratio for certain, otherwise None.
    """
    rising = {
        name: change.overlap_ratio.value
        for name, change in changes.items()
        if change.overlap_ratio.low > 0 and change.overlap_mass.high >= 0
    }
    if rising:
        best = max(rising, key=lambda name: rising[name])
        return best, f"{best} raises the overlap ratio by {rising[best]:.3f} (5.2)"
    if changes and all(change.overlap_ratio.high < 0 for change in changes.values()):
        return as_is, "every other template lowers the overlap ratio (5.2)"
    return None, "no template stands out" if changes else "no other template was compared"
