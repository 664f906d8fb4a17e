"""The page of all claims: from results that exist, with what has not been run named as such."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import results
from experiments.cast import GRPO_CHOICE
from experiments.experiment import load, names
from experiments.report import PAGE, claims_table, not_run, write_report
from tests.unit.experiments.synthetic import synthetic_findings

NAME = "fig02_thinking_patterns"


def write_findings(folder: Path, *, name: str = NAME, key: str | None = None) -> None:
    findings = synthetic_findings(load(name))
    if key is not None:
        for label, arm in findings.arms.items():
            findings.arms[label] = replace(arm, runs=[replace(run, key=key) for run in arm.runs])
    folder.mkdir()
    content = {"experiment": name, **findings.as_json(), "claims": []}
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_what_has_run_is_shown_and_what_has_not_is_named(tmp_path: Path) -> None:
    write_findings(tmp_path / "results")
    page = write_report(tmp_path / "page.md", tmp_path / "results").read_text(encoding="utf-8")
    experiment = load(NAME)
    for claim in experiment.claims(
        results.read_results(experiment, tmp_path / "results") or synthetic_findings(experiment)
    ):
        assert claim.statement in page
        assert f"**{claim.verdict()}**" in page
    assert f"(figures/{NAME}.png)" in page
    assert (tmp_path / "figures" / f"{NAME}.png").is_file()
    not_run = page.split("## Not run yet")[1].split("<a id=")[0]
    assert all(name in not_run for name in names() if name != NAME)
    assert NAME not in not_run
    assert "has changed since" not in page


def test_results_of_an_older_definition_say_so(tmp_path: Path) -> None:
    write_findings(tmp_path / "results", key="another")
    assert "has changed since" in write_report(tmp_path / "page.md", tmp_path / "results").read_text(encoding="utf-8")


def test_what_was_chosen_in_sight_of_the_outcome_stands_beside_the_verdicts(tmp_path: Path) -> None:
    write_findings(tmp_path / "results", name="table1_grpo")
    page = write_report(tmp_path / "page.md", tmp_path / "results").read_text(encoding="utf-8")
    section = page.split('<a id="table1_grpo">')[1]
    assert GRPO_CHOICE in section.split("| claim |")[0]


def test_the_committed_page_says_what_the_committed_results_say(tmp_path: Path) -> None:
    run = [path.stem for path in results.RESULTS.glob("*.json")]
    if not run:
        pytest.skip("no results are committed yet")
    page = PAGE.read_text(encoding="utf-8")
    for name in run:
        experiment = load(name)
        findings = results.read_results(experiment)
        assert findings is not None
        assert claims_table(experiment.claims(findings)) in page, "write it again with `opd experiment report`"


def test_the_committed_page_says_what_is_left_and_what_it_still_needs() -> None:
    done = {path.stem for path in results.RESULTS.glob("*.json")}
    page = PAGE.read_text(encoding="utf-8")
    left = not_run([load(name) for name in names() if name not in done])
    assert all(part in page for part in left), "write it again with `opd experiment report`"
    assert ("## Not run yet" in page) == bool(left)
