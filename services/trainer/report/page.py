"""One HTML file: a table of where each run began and ended, then the figures, embedded as data URIs.

No scripts, fonts or images from elsewhere, so that the page can be mailed and opened offline. All text from runs is
escaped.
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from services.trainer.report.figures import DrawnFigure
from services.trainer.report.runs import Run

TABLE = (
    ("Accuracy of training rollouts", "outcome/accuracy"),
    ("Overlap ratio", "distill/overlap_ratio"),
    ("Overlap-token advantage, nats", "distill/overlap_advantage"),
    ("Entropy gap, nats", "distill/entropy_gap"),
    ("Student entropy, nats", "distill/entropy_student"),
    ("Overlap mass, student", "distill/overlap_mass_student"),
    ("Overlap mass, teacher", "distill/overlap_mass_teacher"),
    ("Reverse KL, nats per position", "loss/reverse_kl"),
    ("Loss of the objective", "loss/objective"),
    ("Gradient norm", "optim/grad_norm"),
    ("Gradient coherence", "distill/gradient_coherence"),
    ("AUROC of the teacher's reward", "outcome/auroc"),
    ("Response length, tokens", "rollout/response_length"),
    ("Step time, s", "timing/step"),
)
"""Rows of the first table: name and metric, shown as first and last value."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child, .words th, .words td { text-align: left; vertical-align: top; }
.scroll { overflow-x: auto; } figure { margin: 0; } img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; }
"""


def write_page(path: Path, runs: Sequence[Run], figures: Sequence[DrawnFigure]) -> None:
    """Writes the page next to nothing: everything it shows is inside it."""
    title = "Distillation report: " + ", ".join(run.name for run in runs)
    tables = (_progress_table(runs), _alarm_table(runs), *_summary_table(runs))
    body = [f"<h1>{escape(title)}</h1>", *tables, *map(_figure, figures)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    text = f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n'
    path.write_text(text + "\n".join(body) + "\n</body></html>\n", encoding="utf-8")


def _progress_table(runs: Sequence[Run]) -> str:
    rows = [["Steps", *(f"{run.records[0]['step']} to {run.records[-1]['step']}" for run in runs)]]
    for label, key in TABLE:
        found = [run.series(key) for run in runs]
        if any(found):
            cells = [
                f"{_number(series.first)} to {_number(series.last)}" if series else "not measured" for series in found
            ]
            rows.append([label, *cells])
    return "<h2>First to last step</h2>\n" + _table(runs, rows)


def _alarm_table(runs: Sequence[Run]) -> str:
    """What was raised while the runs trained, with its numbers as on the figures."""
    found = [(run, alarm) for run in runs for alarm in run.alarms]
    if not found:
        return "<h2>Alarms</h2>\n<p>None was raised.</p>"
    rows = [
        [str(alarm.number), run.name, str(alarm.step), alarm.name, alarm.evidence, alarm.remedy, alarm.section]
        for run, alarm in found
    ]
    head = ("", "run", "step", "alarm", "evidence", "what to do", "paper")
    return "<h2>Alarms</h2>\n" + _html_table(head, rows, kind="words")


def _summary_table(runs: Sequence[Run]) -> list[str]:
    """The scalars of the runs' summaries, nothing when no run has one."""
    keys = sorted({key for run in runs for key, value in run.summary.items() if _is_scalar(value)})
    if not keys:
        return []
    rows = [[key, *(_cell(run.summary.get(key)) for run in runs)] for key in keys]
    return ["<h2>Summary</h2>\n" + _table(runs, rows)]


def _table(runs: Sequence[Run], rows: Sequence[Sequence[str]]) -> str:
    return _html_table(("", *(run.name for run in runs)), rows)


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "numbers") -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">\n<tr>{head}</tr>\n{body}\n</table></div>'


def _figure(figure: DrawnFigure) -> str:
    encoded = base64.b64encode(figure.path.read_bytes()).decode("ascii")
    image = f'<img alt="{escape(figure.title)}" src="data:image/png;base64,{encoded}">'
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
    return f"<h2>{escape(figure.title)}</h2>\n<figure>{image}{caption}</figure>"


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float)


def _cell(value: object) -> str:
    if not _is_scalar(value):
        return "none"
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.4g}"
