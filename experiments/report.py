"""Writes docs/experiments.md: every claim with its verdict and numbers, every figure, from what lies in `results`.

Claims are judged and figures drawn again from the numbers on disk, so that page, claims and figures always agree.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from experiments.availability import missing_needs
from experiments.claims import Check, Claim, Verdict
from experiments.experiment import FOLDER, Experiment, load, names
from experiments.findings import ArmFindings, Findings
from experiments.plan import minutes_of
from experiments.results import RESULTS, draw_figure, is_as_defined, read_results
from services.trainer.evaluation.estimates import Estimate

PAGE = FOLDER.parent / "docs" / "experiments.md"
_HEAD = """# Experiments

The studies of *Rethinking On-Policy Distillation* (arXiv 2604.13016) repeated with the models of the testbed: about one
million parameters, sums solved step by step, a CPU. Every arm is a training run through the real service. Written by
`opd experiment report` from the results in `experiments/results`; change nothing here by hand.

A claim is judged from a number, its 95 % interval and the range that the claim says it lies in. The interval inside the
range: **held**. Outside: **did not hold**. Across a bound, or where the testbed lacks what the claim presupposes:
**cannot be told at this scale**. Intervals of accuracies resample problems and seeds; those of training metrics are
over seeds, or over the steps of a window where an arm has a single seed. Nothing here says what models of billions of
parameters do: the configurations to find that out stand beside each experiment as `paper.toml`.

`opd experiment run NAME` makes what is missing, `opd experiment run all` everything; a run that is stopped goes on
where it was. `--dry-run` shows the arms and how long they take, `--minutes N` starts no arm after N minutes.
"""


def write_report(output: Path | None = None, results: Path = RESULTS) -> Path:
    """Writes the page, and the figures it shows; returns its path."""
    page = output or PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    found = [(experiment, read_results(experiment, results)) for experiment in map(load, names())]
    done = [(experiment, findings) for experiment, findings in found if findings is not None]
    sections = [_section(experiment, findings, page, results) for experiment, findings in done]
    missing = [experiment for experiment, findings in found if findings is None]
    parts = [_HEAD, *_summary(done), *not_run(missing), *sections]
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def _summary(done: Sequence[tuple[Experiment, Findings]]) -> list[str]:
    if not done:
        return []
    lines = ["## At a glance\n", "| experiment | of the paper | held | did not hold | cannot be told |", _rule(5)]
    total: Counter[Verdict] = Counter()
    for experiment, findings in done:
        counts = Counter(claim.verdict() for claim in experiment.claims(findings))
        total += counts
        link = f"[{experiment.title}](#{experiment.name})"
        lines.append(_row(link, experiment.figures, *(str(counts[verdict]) for verdict in Verdict)))
    lines.append(_row("all", "", *(str(total[verdict]) for verdict in Verdict)))
    return ["\n".join(lines) + "\n"]


def not_run(missing: Sequence[Experiment]) -> list[str]:
    """The part on experiments without results, with what this version lacks for each; nothing where there are none."""
    if not missing:
        return []
    lines = ["## Not run yet\n", "| experiment | of the paper | minutes by itself | needs |", _rule(4)]
    for experiment in missing:
        minutes = sum(minutes_of(maker) for maker in experiment.makers())
        needs = ", ".join(f"`{need}`" for need in missing_needs(experiment.needs())) or "nothing more"
        lines.append(_row(f"{experiment.name}: {experiment.title}", experiment.figures, f"{minutes:.0f}", needs))
    return ["\n".join(lines) + "\n"]


def _section(experiment: Experiment, findings: Findings, page: Path, results: Path) -> str:
    figure = draw_figure(experiment, findings, results)
    path = Path(os.path.relpath(figure, page.parent)).as_posix()
    folder = Path(os.path.relpath(FOLDER / experiment.name, page.parent)).as_posix()
    stale = "" if is_as_defined(experiment, findings) else _STALE.format(name=experiment.name)
    return "\n".join(
        [
            f'<a id="{experiment.name}"></a>\n',
            f"## {experiment.figures}: {experiment.title}\n",
            f"{experiment.setting} Section {experiment.section}; [definition and paper's configuration]({folder}).\n",
            *([f"**Chosen in sight of the outcome.** {experiment.caveat}\n"] if experiment.caveat else []),
            *([stale] if stale else []),
            claims_table(experiment.claims(findings)),
            f"![{experiment.figures}: {experiment.title}]({path})\n",
            _arms_table(findings),
        ]
    )


_STALE = "*The definition has changed since these runs; `opd experiment run {name}` brings them up to date.*\n"


def claims_table(claims: Sequence[Claim]) -> str:
    """One line a claim: verdict, every number with its interval, where it started and what was claimed of it."""
    lines = ["| claim | section | verdict | what was seen |", _rule(4)]
    for claim in claims:
        seen = [_check_text(check, "presupposed") for check in claim.conditions]
        seen += [_check_text(check) for check in claim.checks]
        seen += [claim.note] if claim.note else []
        verdict = claim.verdict()
        lines.append(_row(claim.statement, claim.section, f"**{verdict}**", "<br>".join(seen)))
    return "\n".join(lines) + "\n"


def _check_text(check: Check, role: str = "claimed") -> str:
    """Example: `gain: 0.25 [0.21, 0.29], from 0.58 [0.53, 0.62] (claimed > 0)`."""
    found = _estimate_text(check.estimate) if check.estimate else "there is no such number"
    start = f", from {_estimate_text(check.start)}" if check.start else ""
    return f"{check.what}: {found}{start} ({role} {check.range_text()})"


def _estimate_text(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def _arms_table(findings: Findings) -> str:
    heads = ("arm", "student", "teacher", "beyond the base", "seeds", "accuracy before", "after", "teacher's", "key")
    lines = ["| " + " | ".join(heads) + " |", _rule(len(heads))]
    for label, arm in findings.arms.items():
        settings = ", ".join(f"`{name}={value}`" for name, value in arm.settings.items() if name != "data.files")
        teacher = "none" if arm.teacher_by_problem is None else f"{arm.teacher_SP.mean():.3f}"
        accuracies = (f"{arm.before_SP.mean():.3f}", f"{arm.after_SP.mean():.3f}", teacher)
        seeds = ", ".join(str(run.seed) for run in arm.runs)
        lines.append(_row(label, arm.student, arm.teacher or "none", settings, seeds, *accuracies, _key_of(arm)))
    return "\n".join(lines) + "\n"


def _key_of(arm: ArmFindings) -> str:
    return f"`{arm.runs[0].key[:8]}`"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _rule(num_columns: int) -> str:
    return "|" + "---|" * num_columns
