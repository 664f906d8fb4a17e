"""The report of a preflight: table on the terminal, Markdown and HTML with the by-position figure, JSON."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from opd.errors import ConfigError
from services.trainer.evaluation.estimates import Estimate
from services.trainer.recipes.preflight.document import Block, Grid, Heading, Image, Text, html, markdown
from services.trainer.recipes.preflight.findings import Findings, TeacherFindings
from services.trainer.recipes.preflight.rules import Judgement
from services.trainer.report.layout import COLORS, MARKERS

AUROC_NOTE = (
    "AUROC says that a teacher's mean reward tells right from wrong rollouts. It is no evidence of success: in the "
    "paper a failing teacher has as high a one (6.2)."
)
_SIDE_BY_SIDE = 4
_PANELS = (
    ("reverse_kl", "Reverse KL (nats)"),
    ("overlap_ratio", "Overlap ratio (eq 6)"),
    ("overlap_mass_student", "Student mass on overlap (eq 9)"),
    ("entropy_gap", "Entropy gap (nats, eq 8)"),
)
_METRICS = (
    ("reverse KL", "reverse_kl", "{:.3f}"),
    ("overlap ratio, eq 6", "overlap_ratio", "{:.3f}"),
    ("mass, student, eq 9", "overlap_mass_student", "{:.3f}"),
    ("mass, teacher, eq 10", "overlap_mass_teacher", "{:.3f}"),
    ("99 % sets agree", "mass99_overlap", "{:.3f}"),
    ("advantage, eq 7", "overlap_advantage", "{:.4f}"),
    ("entropy gap, eq 8", "entropy_gap", "{:.3f}"),
)


def print_findings(found: Findings, console: Console) -> None:
    """Ranks with their reasons, then the numbers; at most four teachers side by side fit 80 columns."""
    head, *rows = _rank_table(found)
    ranks = Table(title="Teachers by predicted gain", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in head[:-1]:
        ranks.add_column(name, overflow="fold")
    for cells in rows:
        ranks.add_row(*cells[:-1])
    console.print(ranks)
    for place, name, *_, reason in rows:
        console.print(f"{place}. {name}: {reason}", markup=False, highlight=False)
    for start in range(0, len(found.teachers), _SIDE_BY_SIDE):
        numbers = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        head, *rows = _number_table(found.teachers[start : start + _SIDE_BY_SIDE], _plus_minus)
        for index, name in enumerate(head):
            numbers.add_column(name, justify="right" if index else "left", overflow="fold")
        for row in rows:
            numbers.add_row(*row)
        console.print(numbers)
    console.print(AUROC_NOTE, markup=False, highlight=False)


def _rank_table(found: Findings) -> list[list[str]]:
    by_name = {teacher.name: teacher for teacher in found.teachers}
    rows = [
        [
            str(ranked.place),
            ranked.name,
            _verdict(by_name[ranked.name].compatible),
            _verdict(by_name[ranked.name].new_knowledge),
            ranked.predicted,
            ranked.reason,
        ]
        for ranked in found.ranking
    ]
    return [["", "teacher", "patterns fit", "new knowledge", "predicted", "because"], *rows]


def _verdict(judgement: Judgement | None) -> str:
    return "refused" if judgement is None else str(judgement.verdict)


def _number_table(teachers: Sequence[TeacherFindings], shown: Callable[[Estimate | None, str], str]) -> list[list[str]]:
    rows = [["", *(teacher.name for teacher in teachers)]]
    for label, key, text in _METRICS:
        rows.append([label, *(shown(teacher.metrics.get(key), text) for teacher in teachers)])
    rows.append(["accuracy", *(shown(teacher.accuracy, "{:.3f}") for teacher in teachers)])
    rows.append(["ahead of student", *(shown(teacher.gap, "{:+.3f}") for teacher in teachers)])
    if any(teacher.pilot for teacher in teachers):
        pilots = [teacher.pilot for teacher in teachers]
        rows.append(["gained by the pilot", *(shown(item.gain if item else None, "{:+.3f}") for item in pilots)])
    gradients = [teacher.gradient for teacher in teachers]
    rows.append(["loss of one batch", *(f"{item.loss:.4f}" if item else "-" for item in gradients)])
    rows.append(["its gradient norm", *(f"{item.grad_norm:.3f}" if item else "-" for item in gradients)])
    rows.append(
        [
            "coherence (unrelated)",
            *(
                f"{item.coherence:.2f} ({item.unrelated_coherence:.2f})" if item and item.coherence is not None else "-"
                for item in gradients
            ),
        ]
    )
    rows.append(["best template", *(teacher.best_template or "none" for teacher in teachers)])
    rows.append(["AUROC, no evidence", *("-" if item.auroc is None else f"{item.auroc:.2f}" for item in teachers)])
    return rows


def interval(estimate: Estimate | None, text: str) -> str:
    """A value with its interval, or a dash."""
    if estimate is None:
        return "-"
    value, low, high = (text.format(number) for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _plus_minus(estimate: Estimate | None, text: str) -> str:
    """Half the interval's width, for where there is no room for both ends."""
    if estimate is None:
        return "-"
    half = text.replace("+", "").format((estimate.high - estimate.low) / 2)
    return f"{text.format(estimate.value)} ±{half}"


def write_report(found: Findings, folder: Path, settings: dict[str, Any]) -> list[Path]:
    """`preflight.json`, `.md`, `.html` and `by_position.png` in `folder`; their paths."""
    figure, paths = folder / "by_position.png", [folder / f"preflight.{end}" for end in ("json", "md", "html")]
    record = _finite({"settings": settings} | found.as_json())
    try:
        _draw(found, figure)
        blocks = _blocks(found, figure)
        texts = (json.dumps(record, indent=2, allow_nan=False) + "\n", markdown(blocks), html("Preflight", blocks))
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: cannot be written ({error.strerror}); free space there") from error
    return paths


def _finite(value: Any) -> Any:
    """JSON has no infinities and no NaN."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _blocks(found: Findings, figure: Path) -> list[Block]:
    accuracy = {name: interval(estimate, "{:.3f}") for name, estimate in found.student_accuracy.items()}
    said = ", ".join(f"{name} {value}" for name, value in accuracy.items()) or "no answers known"
    blocks: list[Block] = [
        Heading(text=f"Preflight of {found.student}", level=1),
        Text(
            text=f"{found.num_prompts} prompts, {found.rollouts_per_prompt} rollouts each of {found.mean_tokens:.0f} "
            f"tokens on average ({found.truncated:.1%} cut off). Accuracy of the student: {said}. Intervals are 95 %, "
            "over prompts."
        ),
        Heading(text="Teachers by predicted gain"),
        Grid(rows=_rank_table(found)),
        Heading(text="Numbers"),
        Grid(rows=_number_table(found.teachers, interval)),
        Text(text="Gradient coherence: in brackets, what unrelated gradients would have. " + AUROC_NOTE),
        Image(path=figure, caption="By position in the response (start of bucket, tokens)"),
    ]
    for teacher in found.teachers:
        blocks += _teacher_blocks(teacher, found.same_as_is)
    return blocks


def _teacher_blocks(teacher: TeacherFindings, same_as_is: Sequence[str]) -> list[Block]:
    blocks: list[Block] = [Heading(text=teacher.name)]
    blocks += [Text(text=f"Refused: {teacher.refusal}")] if teacher.refusal else []
    blocks += [Text(text=f"Warning: {warning}") for warning in teacher.warnings]
    for title, judgement in (("Patterns fit", teacher.compatible), ("New knowledge", teacher.new_knowledge)):
        if judgement is None:
            continue
        blocks.append(Text(text=f"{title}: {judgement.verdict} ({judgement.reason})."))
        if judgement.evidence:
            rows = [
                [item.name, interval(item.estimate, "{:.4f}"), f"{item.threshold:g}", item.verdict, item.section or "-"]
                for item in judgement.evidence
            ]
            blocks.append(Grid(rows=[["evidence", "seen", "threshold", "speaks for it", "paper"], *rows]))
    if not teacher.refusal:
        same = f" The prompts are in {', '.join(same_as_is)} already." if same_as_is else ""
        blocks.append(Text(text=f"Template: {teacher.template_reason}.{same}"))
    if teacher.templates:
        rows = [
            [
                name,
                *(interval(item, "{:+.4f}") for item in (change.overlap_ratio, change.overlap_mass, change.reverse_kl)),
            ]
            for name, change in teacher.templates.items()
        ]
        blocks.append(Grid(rows=[["template against as-is", "overlap ratio", "overlap mass", "reverse KL"], *rows]))
    return blocks


def _draw(found: Findings, path: Path) -> None:
    figure = Figure(figsize=(10, 6.4), dpi=100, layout="constrained")
    for ax, (key, title) in zip(figure.subplots(2, 2).ravel(), _PANELS, strict=True):
        starts: list[int] = sorted({point.start for item in found.teachers for point in item.by_position.get(key, ())})
        for index, teacher in enumerate(found.teachers):
            points = teacher.by_position.get(key, ())
            places = [starts.index(point.start) for point in points]
            look = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
            ax.plot(places, [point.value for point in points], label=teacher.name, markersize=4, **look)
        ax.set_xticks(range(len(starts)), [str(start) for start in starts])
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("position in the response (start of bucket)", fontsize=8)
        ax.grid(True, color="#DDDDDD", linewidth=0.6)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, format="png", metadata={"Software": None})
