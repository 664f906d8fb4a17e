"""Every experiment is whole: it can be judged, drawn, run within the time that was promised, and repeated on GPUs."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.arms import MAX_MINUTES_OF_SEVERAL_SEEDS, Arm
from experiments.availability import missing_needs
from experiments.cast import COLD_START, COLD_START_CHOICE, GRPO, GRPO_CHOICE
from experiments.experiment import FOLDER, load, names
from experiments.keys import settings_of
from experiments.plan import estimated_minutes
from experiments.results import MAX_FIGURE_BYTES, draw_figure
from experiments.store import Store
from opd.settings import load_settings
from services.trainer.config import TrainSettings
from testbed.stack import DATA, MODELS
from tests.unit.experiments.synthetic import synthetic_findings

FIGURES = ("2", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16", "17", "18", "19", "20", "21",
           "22", "23")  # fmt: skip
MAX_MINUTES = 180


def test_every_figure_of_the_paper_has_an_experiment() -> None:
    shown = " ".join(load(name).figures for name in names()).replace(",", "").replace("Figs", "").replace("Fig", "")
    assert set(FIGURES) <= set(shown.split())


def test_the_whole_set_fits_the_time() -> None:
    assert estimated_minutes([load(name) for name in names()], Store(folder=Path("nowhere"))) <= MAX_MINUTES


@pytest.mark.parametrize("name", names())
def test_its_arms_are_settings_of_the_trainer(name: str) -> None:
    experiment = load(name)
    assert experiment.name == name
    missing = missing_needs(experiment.needs())
    for maker in experiment.makers():
        if isinstance(maker, Arm):
            assert (len(maker.seeds) == 3) == (maker.minutes <= MAX_MINUTES_OF_SEVERAL_SEEDS)
            assert all((DATA / file).is_file() for file in (*maker.data, maker.evaluation.data))
            named = [model for model in (maker.student, maker.teacher) if isinstance(model, str)]
            assert all((MODELS / model).is_dir() for model in named)
            if not any(need.startswith("objective.") for need in missing):
                TrainSettings.model_validate(settings_of(maker) | {"student": {"model": "m"}, "data": {"files": ["f"]}})


@pytest.mark.parametrize("name", [name for name in names() if name != "table1_grpo"])
def test_the_published_gradient_is_an_arm_of_every_figure(name: str) -> None:
    settings = [settings_of(arm)["objective"] for arm in load(name).arms.values()]
    assert any((one["kind"], one["gradient"]) == ("top_k", "policy") for one in settings)


@pytest.mark.parametrize("name", names())
def test_it_can_be_judged_and_drawn(name: str, tmp_path: Path) -> None:
    experiment = load(name)
    findings = synthetic_findings(experiment)
    claims = experiment.claims(findings)
    assert claims
    assert len({claim.statement for claim in claims}) == len(claims)
    assert all(claim.checks and claim.section for claim in claims)
    figure = draw_figure(experiment, findings, tmp_path / "results")
    assert figure == tmp_path / "figures" / f"{name}.png"
    assert 10_000 < figure.stat().st_size < MAX_FIGURE_BYTES


@pytest.mark.parametrize("name", names())
def test_the_papers_configuration_is_one_of_the_trainer(name: str) -> None:
    assert (FOLDER / name / "README.md").is_file()
    path = FOLDER / name / "paper.toml"
    if missing := [need for need in missing_needs(load(name).needs()) if "kind=grpo" in need and "table1" in name]:
        pytest.skip(f"this version has no {missing[0]}")
    runs = [shlex.split(line[1:]) for line in path.read_text(encoding="utf-8").splitlines() if "   opd train " in line]
    assert runs
    for words in runs:
        assert words[:3] == ["opd", "train", "--config"]
        assert FOLDER.parent / words[3] == path
        settings = load_settings(TrainSettings, path, words[4:])
        assert settings.optim.lr == 1e-6
        assert settings.rollout.prompts_per_step == 64
        assert settings.evaluation.num_samples == 16


@pytest.mark.parametrize("name", names())
def test_a_difference_starts_at_a_difference(name: str) -> None:
    """Of arms that are all alike, every difference between two starts at 0 or is given without a start."""
    experiment = load(name)
    findings = synthetic_findings(experiment)
    one = next(iter(findings.arms.values()))
    alike = replace(findings, arms=dict.fromkeys(findings.arms, one))
    checks = [check for claim in experiment.claims(alike) for check in (*claim.checks, *claim.conditions)]
    between_two = [check for check in checks if " minus " in check.what or "largest gap" in check.what]
    assert [check.what for check in between_two if check.start and abs(check.start.value) > 1e-9] == []


CHOSEN = ((GRPO, GRPO_CHOICE, ("2e-4", "0.64", "6e-5", "0.43", "0.59", "8e-5", "96 steps")),
          (COLD_START, COLD_START_CHOICE, ("8e-4", "0.10", "1e-3", "0.19", "1.5e-3", "0.79")))  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_what_was_chosen_in_sight_of_the_outcome_is_said(name: str) -> None:
    experiment = load(name)
    for maker, choice, figures in CHOSEN:
        is_used = maker in experiment.makers()
        assert (choice in experiment.caveat) == is_used
        if is_used:
            readme = (FOLDER / name / "README.md").read_text(encoding="utf-8")
            assert all(figure in choice and figure in readme for figure in figures)
