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
    """What a short training run did: its curves' change per step; None for one not measured, or of too few steps."""

    num_steps: int
    reverse_kl: Estimate | None
    overlap_ratio: Estimate | None
    accuracy: Estimate | None
    """Of the training rollouts, other prompts at each step: noisy."""
    gain: Estimate | None = None
    """Accuracy after the run minus before, on the same prompts with the same seeds; None where no answer is known."""


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
    pilot_gain: Estimate | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranked:
    """A teacher's place, 1 the best, and why."""

    name: str
    place: int
    predicted: str
    """`gain`, `possible gain`, `little`, `loss`, `risky` or `none`."""
    reason: str


def above(name: str, estimate: Estimate, threshold: float, section: str, *, is_change: bool = False) -> Evidence:
    """`yes` where the interval lies at or above the threshold, `no` where it lies below.

    A change has to lie beyond its threshold: where nothing has moved the interval is 0 to 0, and that is no gain.
    """
    verdict = Verdict.UNCLEAR
    if estimate.low > threshold or (estimate.low == threshold and not is_change):
        verdict = Verdict.YES
    elif estimate.high < threshold:
        verdict = Verdict.NO
    return Evidence(name=name, estimate=estimate, threshold=threshold, verdict=verdict, section=section)


def below(name: str, estimate: Estimate, threshold: float, section: str, *, is_change: bool = False) -> Evidence:
    """`yes` where the interval lies at or below the threshold, `no` where it lies above; changes as in `above`."""
    mirrored = above(name, _negated(estimate), -threshold, section, is_change=is_change)
    return Evidence(name=name, estimate=estimate, threshold=threshold, verdict=mirrored.verdict, section=section)


def _negated(estimate: Estimate) -> Estimate:
    return Estimate(value=-estimate.value, low=-estimate.high, high=-estimate.low)


_OF_TOP_K = ("overlap_mass_student", "overlap_mass_teacher", "overlap_ratio", "mass99_overlap")


def judge_compatibility(metrics: Mapping[str, Estimate], limits: Thresholds) -> Judgement:
    """Condition 1: compatible thinking patterns (3.1).

    `no` when the shared tokens lack mass (C.2), the sets that hold 0.99 differ, or the entropies do (4.1). `yes` when
    both masses are high (B.1) and either the ratio or the 0.99 sets agree. Nothing is told of a teacher that sends no
    top-k. AUROC, KL and advantage decide nothing: a failing run may have the smaller loss (B.2) and as good a reward
    (6.2).
    """
    missing = [name for name in _OF_TOP_K if name not in metrics]
    if missing:
        return _untold(f"not measured: {', '.join(missing)}; the teacher sends no top-k")
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

    `yes` when accuracy has risen while the student came closer (KL falls), `no` when it has fallen. Accuracy that rises
    while KL does not fall is no sign yet: alignment is what marks a run that works (4.1).
    """
    if pilot is None:
        return _untold("no pilot was run (--pilot-steps)")
    if pilot.gain is None:
        return _untold("no answer is known, so the pilot shows no accuracy")
    if pilot.reverse_kl is None:
        return _untold(f"{pilot.num_steps} steps are too few for a slope; give --pilot-steps 4 or more")
    rises = above("accuracy gained by the pilot", pilot.gain, limits.pilot_gain, "3.2", is_change=True)
    falls = below("reverse KL per step", pilot.reverse_kl, 0.0, "4.1, B.2", is_change=True)
    evidence = [rises, falls]
    for name, estimate in (("overlap ratio per step", pilot.overlap_ratio), ("accuracy per step", pilot.accuracy)):
        if estimate is not None:
            evidence.append(above(name, estimate, 0.0, "4.1", is_change=True))
    verdict, reason = _by_pilot(rises.verdict, falls.verdict)
    return Judgement(verdict=verdict, evidence=tuple(evidence), reason=reason)


def _by_pilot(rises: Verdict, falls: Verdict) -> tuple[Verdict, str]:
    if rises is Verdict.NO:
        return Verdict.NO, "the pilot lost accuracy"
    if rises is Verdict.UNCLEAR:
        return Verdict.UNCLEAR, "what the pilot gained is within the noise"
    if falls is Verdict.YES:
        return Verdict.YES, "accuracy rose while the student came closer"
    return Verdict.UNCLEAR, "accuracy rose, but the student came no closer: run a longer pilot"


def _untold(reason: str) -> Judgement:
    return Judgement(verdict=Verdict.CANNOT_BE_TOLD, evidence=(), reason=reason)


def rank(candidates: Sequence[Candidate], limits: Thresholds) -> list[Ranked]:
    """Best first by predicted gain; among equals by the pilot's gain, then the gap, then the overlap mass."""
    predicted = [(candidate, *predict(candidate, limits)) for candidate in candidates]
    order = sorted(predicted, key=lambda item: (_ORDER.index(item[1]), *_tie_break(item[0])))
    return [
        Ranked(name=candidate.name, place=place, predicted=prediction, reason=reason)
        for place, (candidate, prediction, reason) in enumerate(order, start=1)
    ]


_ORDER = ("gain", "possible gain", "little", "loss", "risky", "none")


def _tie_break(candidate: Candidate) -> tuple[float, float, float]:
    found = (candidate.pilot_gain, candidate.gap, candidate.overlap_mass)
    gain, gap, mass = (-estimate.value if estimate is not None else 0.0 for estimate in found)
    return gain, gap, mass


def predict(candidate: Candidate, limits: Thresholds) -> tuple[str, str]:
    """The predicted gain and its reason, by both conditions and by what there is to gain.

    A student comes to where its teacher is, up or down (3.3): an equal costs nothing, a worse one costs the difference,
    and other patterns than the student's own may cost everything (3.1).
    """
    compatible, knowledge, gap = candidate.compatible, candidate.new_knowledge, candidate.gap
    if candidate.is_refused or compatible is None:
        return "none", "the handshake refuses it"
    if compatible.verdict is Verdict.NO:
        return "risky", f"patterns do not fit (3.1): {compatible.reason}"
    if gap is not None and gap.high < 0:
        return "loss", "it is worse than the student, which comes down to it (3.3)"
    if gap is not None and gap.high < limits.accuracy_gap:
        return "little", "it is hardly better than the student (3.2)"
    known, said = (knowledge.verdict, knowledge.reason) if knowledge else (Verdict.CANNOT_BE_TOLD, "no pilot was run")
    if known is Verdict.NO:
        return "little", f"nothing new (3.2): {said}"
    if known is Verdict.YES:
        certain = "gain" if compatible.verdict is Verdict.YES else "possible gain"
        return certain, "patterns fit, and the pilot gains" if certain == "gain" else "the pilot gains; fit not settled"
    if gap is not None and gap.low <= limits.accuracy_gap:
        return "little", "its lead over the student is within the noise (3.2)"
    fit = "patterns fit" if compatible.verdict is Verdict.YES else f"fit {compatible.reason}"
    return "possible gain", f"{fit}; whether it has something new is open (3.2): {said}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateChange:
    """A template against the prompts as they are, on the same problems: template minus as-is; None: not measured."""

    overlap_ratio: Estimate | None
    overlap_mass: Estimate | None
    """Mean of the student's and the teacher's."""
    reverse_kl: Estimate | None


def judge_templates(changes: Mapping[str, TemplateChange], as_is: str) -> tuple[str | None, str]:
    """Which way of asking aligns best (5.2, Fig 9: the aligned template begins with the higher overlap ratio).

    A template is named where its ratio rises for certain while the mass does not fall for certain, `as_is` where all
    others lower the ratio for certain, otherwise None.
    """
    known = {
        name: (change.overlap_ratio, change.overlap_mass)
        for name, change in changes.items()
        if change.overlap_ratio is not None and change.overlap_mass is not None
    }
    rising = {name: ratio.value for name, (ratio, mass) in known.items() if ratio.low > 0 and mass.high >= 0}
    if rising:
        best = max(rising, key=lambda name: rising[name])
        return best, f"{best} raises the overlap ratio by {rising[best]:.3f} (5.2)"
    if not changes:
        return None, "no other template was compared"
    if len(known) < len(changes):
        return None, "the overlap was not measured"
    if all(ratio.high < 0 for ratio, _ in known.values()):
        return as_is, "every other template lowers the overlap ratio (5.2)"
    return None, "no template stands out"
