"""What an experiment leaves: `results/NAME.json` with numbers and verdicts, `figures/NAME.png`.

The JSON holds everything that claims and figure are made from, so that both can be made again, by a later version too,
without running anything.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from experiments.claims import Claim
from experiments.experiment import FOLDER, Experiment
from experiments.findings import Findings, findings_of
from experiments.keys import command_key, run_key
from experiments.store import Store, evaluation_keys_of
from opd.files import whole_file

RESULTS = FOLDER / "results"
MAX_FIGURE_BYTES = 500_000


def collect(experiment: Experiment, store: Store) -> Findings:
    """The findings of an experiment of which nothing is missing."""
    arms = {label: store.findings(arm) for label, arm in experiment.arms.items()}
    return Findings(
        arms=arms,
        reports={label: store.report(made) for label, made in experiment.reports.items()},
        report_keys=_report_keys(experiment),
    )


def write_results(experiment: Experiment, store: Store, results: Path = RESULTS) -> Sequence[Claim]:
    """Judges, writes the JSON and draws the figure; returns the claims."""
    findings = collect(experiment, store)
    claims = experiment.claims(findings)
    results.mkdir(parents=True, exist_ok=True)
    content = {"experiment": experiment.name, **findings.as_json()}
    content["claims"] = [claim.as_json() for claim in claims]
    # One line a key: numbers by the thousand would make a line each otherwise.
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    with whole_file(results / f"{experiment.name}.json") as partial:
        partial.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        draw_figure(experiment, findings, results)
    return claims


def draw_figure(experiment: Experiment, findings: Findings, results: Path = RESULTS) -> Path:
    """Draws `figures/NAME.png` beside the folder of results."""
    from experiments.drawing import draw

    path = figure_path(experiment, results)
    draw(findings, experiment.panels, f"{experiment.figures}: {experiment.title}", path)
    return path


def figure_path(experiment: Experiment, results: Path = RESULTS) -> Path:
    return results.with_name("figures") / f"{experiment.name}.png"


def read_results(experiment: Experiment, results: Path = RESULTS) -> Findings | None:
    """The findings that lie there; None where the experiment has not been run."""
    path = results / f"{experiment.name}.json"
    return findings_of(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def is_as_defined(experiment: Experiment, findings: Findings) -> bool:
    """Whether runs, grades and reports of the findings are those of the experiment as it is defined now."""
    defined = {
        label: ([run_key(arm, seed) for seed in arm.seeds], evaluation_keys_of(arm))
        for label, arm in experiment.arms.items()
    }
    found = {label: ([run.key for run in arm.runs], arm.evaluation_keys) for label, arm in findings.arms.items()}
    return defined == found and _report_keys(experiment) == findings.report_keys


def _report_keys(experiment: Experiment) -> dict[str, str]:
    return {label: command_key(command) for label, command in experiment.reports.items()}
