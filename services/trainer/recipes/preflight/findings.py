"""What a preflight has found, as records: estimates from the sums per prompt, verdicts, ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from services.trainer.diagnostics import POSITION_EDGES
from services.trainer.diagnostics.outcomes import auroc
from services.trainer.evaluation.estimates import Estimate
from services.trainer.recipes.preflight import rules
from services.trainer.recipes.preflight.estimates import Values, difference_over_prompts, ratio_over_prompts
from services.trainer.recipes.preflight.gradient import BatchGradient
from services.trainer.recipes.preflight.records import AnswerRecord, PromptRecord, RecordFile
from services.trainer.recipes.preflight.rules import Judgement, PilotSlopes, Ranked, TemplateChange
from services.trainer.recipes.preflight.settings import AS_IS, PreflightSettings
from services.trainer.recipes.preflight.teachers import MetTeacher

Column = tuple[Values, Values]
"""Totals and counts per prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionPoint:
    """One bucket of response positions that anything fell into."""

    start: int
    value: float
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherFindings:
    """One teacher; everything measured is of the prompts as they are unless it says otherwise."""

    name: str
    model: str
    fingerprint: str
    refusal: str
    warnings: tuple[str, ...]
    metrics: dict[str, Estimate]
    by_position: dict[str, tuple[PositionPoint, ...]]
    accuracy: Estimate | None
    gap: Estimate | None
    """Its accuracy minus the student's, on the same prompts."""
    auroc: float | None
    """Of its mean reward for right against wrong rollouts: no evidence of success (6.2)."""
    gradient: BatchGradient | None
    templates: dict[str, TemplateChange]
    best_template: str | None
    template_reason: str
    pilot: PilotSlopes | None
    compatible: Judgement | None
    new_knowledge: Judgement | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """The whole preflight."""

    student: str
    num_prompts: int
    rollouts_per_prompt: int
    student_accuracy: dict[str, Estimate]
    """By template; absent where no answer is known."""
    mean_tokens: float
    truncated: float
    same_as_is: tuple[str, ...]
    teachers: tuple[TeacherFindings, ...]
    ranking: tuple[Ranked, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def find_out(
    settings: PreflightSettings,
    student: str,
    teachers: Sequence[MetTeacher],
    records: RecordFile,
    gradients: Mapping[str, BatchGradient],
    pilots: Mapping[str, PilotSlopes],
    same_as_is: tuple[str, ...],
) -> Findings:
    """Everything from what was measured; pure but for reading `records`."""
    names = dict.fromkeys(template for template, _ in records.prompts)
    by_template = {name: records.prompts_in(name) for name in names}
    as_is = by_template[AS_IS]
    findings = tuple(
        _teacher_findings(
            settings, teacher, by_template, records, gradients.get(teacher.name), pilots.get(teacher.name)
        )
        for teacher in teachers
    )
    accuracies = {name: _accuracy(found, settings.seed) for name, found in by_template.items()}
    lengths = [length for record in as_is for length in record.num_tokens]
    return Findings(
        student=student,
        num_prompts=len(as_is),
        rollouts_per_prompt=settings.rollouts_per_prompt,
        student_accuracy={name: accuracy for name, accuracy in accuracies.items() if accuracy is not None},
        mean_tokens=float(np.mean(lengths)),
        truncated=float(np.mean([is_cut for record in as_is for is_cut in record.is_truncated])),
        same_as_is=same_as_is,
        teachers=findings,
        ranking=tuple(rules.rank([_candidate(teacher) for teacher in findings], settings.thresholds)),
    )


def _teacher_findings(
    settings: PreflightSettings,
    teacher: MetTeacher,
    by_template: Mapping[str, Sequence[PromptRecord]],
    records: RecordFile,
    gradient: BatchGradient | None,
    pilot: PilotSlopes | None,
) -> TeacherFindings:
    is_met = teacher.info is not None
    name, seed, as_is = teacher.name, settings.seed, by_template[AS_IS]
    metrics = _metrics(as_is, name, seed) if is_met else {}
    answers = records.answers_of(name)
    changes = {
        template: _template_change(as_is, found, name, seed)
        for template, found in by_template.items()
        if is_met and template != AS_IS
    }
    best, reason = rules.judge_templates(changes, AS_IS)
    return TeacherFindings(
        name=name,
        model=teacher.info.model if teacher.info else teacher.settings.model or teacher.settings.pool,
        fingerprint=teacher.info.fingerprint if teacher.info else "",
        refusal=teacher.refusal,
        warnings=teacher.warnings,
        metrics=metrics,
        by_position=_by_position(as_is, name) if is_met else {},
        accuracy=_accuracy(answers, seed),
        gap=accuracy_difference(answers, as_is, seed),
        auroc=_auroc(as_is, name) if is_met else None,
        gradient=gradient,
        templates=changes,
        best_template=best,
        template_reason=reason,
        pilot=pilot,
        compatible=rules.judge_compatibility(metrics, settings.thresholds) if is_met else None,
        new_knowledge=rules.judge_new_knowledge(pilot, settings.thresholds) if is_met else None,
    )


def _candidate(found: TeacherFindings) -> rules.Candidate:
    return rules.Candidate(
        name=found.name,
        is_refused=bool(found.refusal),
        compatible=found.compatible,
        new_knowledge=found.new_knowledge,
        gap=found.gap,
        overlap_mass=found.metrics.get("overlap_mass_student"),
        pilot_gain=found.pilot.gain if found.pilot else None,
    )


def _column(records: Sequence[PromptRecord], teacher: str, key: str) -> Column:
    sums = [record.teachers[teacher].metrics.get(key, (0.0, 0.0)) for record in records]
    return np.array([total for total, _ in sums]), np.array([count for _, count in sums])


def _metrics(records: Sequence[PromptRecord], teacher: str, seed: int) -> dict[str, Estimate]:
    """Means over positions by the name's last part, and the entropy gap as a share of the student's entropy."""
    found = {}
    for key in sorted({key for record in records for key in record.teachers[teacher].metrics}):
        totals, counts = _column(records, teacher, key)
        if counts.sum():
            found[key.rpartition("/")[2]] = ratio_over_prompts(totals, counts, seed=seed)
    gaps, entropies = (_column(records, teacher, f"distill/entropy_{part}")[0] for part in ("gap", "student"))
    if "entropy_gap" in found and entropies.sum() > 0:
        found["entropy_gap_share"] = ratio_over_prompts(gaps, entropies, seed=seed)
    return found


def _by_position(records: Sequence[PromptRecord], teacher: str) -> dict[str, tuple[PositionPoint, ...]]:
    keys = sorted({key for record in records for key in record.teachers[teacher].by_position})
    curves = {}
    for key in keys:
        found = [record.teachers[teacher].by_position for record in records]
        parts = [curve[key] for curve in found if key in curve]
        totals, counts = (np.sum([part[column] for part in parts], axis=0) for column in (0, 1))
        curves[key.rpartition("/")[2]] = tuple(
            PositionPoint(start=start, value=float(total / count), count=int(count))
            for start, total, count in zip(POSITION_EDGES, totals, counts, strict=True)
            if count
        )
    return curves


def _template_change(
    as_is: Sequence[PromptRecord], others: Sequence[PromptRecord], teacher: str, seed: int
) -> TemplateChange:
    wanted = {record.prompt for record in others}
    same = [record for record in as_is if record.prompt in wanted]

    def change(read: Callable[[Sequence[PromptRecord]], Column]) -> Estimate | None:
        one, other = read(others), read(same)
        return difference_over_prompts(one, other, seed=seed) if one[1].sum() and other[1].sum() else None

    def mass(records: Sequence[PromptRecord]) -> Column:
        sides = [_column(records, teacher, f"distill/overlap_mass_{side}") for side in ("student", "teacher")]
        return sides[0][0] + sides[1][0], sides[0][1] + sides[1][1]

    return TemplateChange(
        overlap_ratio=change(lambda records: _column(records, teacher, "distill/overlap_ratio")),
        overlap_mass=change(mass),
        reverse_kl=change(lambda records: _column(records, teacher, "loss/reverse_kl")),
    )


def _outcomes(records: Sequence[PromptRecord] | Sequence[AnswerRecord]) -> Column:
    known = [[value for value in record.is_correct if value is not None] for record in records]
    return np.array([float(sum(values)) for values in known]), np.array([float(len(values)) for values in known])


def _accuracy(records: Sequence[PromptRecord] | Sequence[AnswerRecord], seed: int) -> Estimate | None:
    totals, counts = _outcomes(records)
    return ratio_over_prompts(totals, counts, seed=seed) if counts.sum() else None


def accuracy_difference(answers: Sequence[AnswerRecord], as_is: Sequence[PromptRecord], seed: int) -> Estimate | None:
    """Of whoever answered minus the student's, on the prompts that both have answered."""
    answered = {record.prompt for record in answers}
    teacher, student = _outcomes(answers), _outcomes([record for record in as_is if record.prompt in answered])
    if not teacher[1].sum() or not student[1].sum():
        return None
    return difference_over_prompts(teacher, student, seed=seed)


def _auroc(records: Sequence[PromptRecord], teacher: str) -> float | None:
    judged = [
        (reward, is_correct)
        for record in records
        for reward, is_correct in zip(record.teachers[teacher].rewards, record.is_correct, strict=True)
        if is_correct is not None and reward is not None
    ]
    return auroc([reward for reward, _ in judged], [is_correct for _, is_correct in judged])
