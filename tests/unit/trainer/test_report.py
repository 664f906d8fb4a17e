"""The report of made-up runs: every figure drawn, the page complete in itself, a broken run named in one line."""

import base64
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd.errors import ConfigError
from services.trainer.diagnostics import POSITION_EDGES
from services.trainer.report import positions, write_report
from services.trainer.report import rewards as reward_figure
from services.trainer.report.figures import HEAT_MAPS
from services.trainer.report.runs import Run, read_runs

PNG = b"\x89PNG\r\n\x1a\n"
BY_POSITION = ("overlap_ratio", "overlap_advantage", "entropy_student", "entropy_teacher", "entropy_gap")
FIGURES = {"dynamics", "sets_and_entropy", "optimization", "rollouts", "rewards", "by_position", "heat_maps", "timing"}


def _record(step: int, seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(1000 * seed + step)
    done = 1 - math.exp(-step / 40)
    noise = float(generator.normal()) * 0.01
    record: dict[str, Any] = {
        "step": step,
        "outcome/accuracy": 0.2 + 0.4 * done + noise,
        "outcome/auroc": 0.7 + noise,
        "distill/overlap_ratio": 0.72 + 0.19 * done + noise,
        "distill/overlap_advantage": -0.05 * (1 - done) - 0.002,
        "distill/entropy_student": 1.1 - 0.3 * done + noise,
        "distill/entropy_teacher": 0.7 + noise,
        "distill/entropy_gap": 0.4 - 0.3 * done + noise,
        "distill/overlap_mass_student": 0.97 + 0.02 * done,
        "distill/overlap_mass_teacher": 0.98 + 0.01 * done,
        "distill/mass99_overlap": 0.5 + 0.3 * done,
        "distill/empty_overlap_fraction": 0.01 * (1 - done),
        "distill/extreme_prob_gap": 0.2 * (1 - done) + noise,
        "distill/extreme_prob_gap_abs": 0.3 * (1 - done) + 0.02,
        "loss/objective": 0.3 * (1 - done) + 0.02,
        "loss/reverse_kl": 0.3 * (1 - done) + 0.02,
        "distill/uniform_teacher_fraction": 0.0,
        "distill/gradient_coherence": 0.3 + noise,
        "optim/grad_norm": 1.5 * (1 - done) + 0.3 + noise,
        "rollout/response_length": 200 + 20 * done,
        "rollout/truncated_fraction": 0.1,
        "rollout/teacher_reward": -0.3 * (1 - done),
        "outcome/rewards_correct": sorted((generator.normal(size=6) * 0.1 - 0.1).tolist()),
        "outcome/rewards_incorrect": sorted((generator.normal(size=9) * 0.1 - 0.3).tolist()),
        "outcome/teacher_reward_correct": -0.1 * (1 - done),
        "outcome/teacher_reward_incorrect": -0.4 * (1 - done),
        "timing/rollout": 4.0,
        "timing/score_wait": 0.4,
        "timing/forward_backward": 2.0,
        "timing/optimizer": 0.2,
        "timing/publish": 0.1,
        "timing/step": 6.7,
        "timing/tokens_per_second": 900 + 50 * noise,
        "distill/position_edges": list(POSITION_EDGES),
    }
    counts = [640, 600, 900, 1500, 2200, 1800, *[0] * (len(POSITION_EDGES) - 6)]
    for name in BY_POSITION:
        level = record[f"distill/{name}"]
        record[f"distill/{name}/by_position"] = [
            level * (1 - 0.1 * bucket) if count else None for bucket, count in enumerate(counts)
        ]
        record[f"distill/{name}/by_position/count"] = counts
    return record


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, seed: int = 0, steps: int = 12, keep: tuple[str, ...] = ("",), tail: str = "") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        records = [_record(step, seed) for step in range(1, steps + 1)]
        kept = [{k: v for k, v in record.items() if k.startswith(("step", *keep))} for record in records]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        (folder / "metrics.jsonl").write_text(lines + tail, encoding="utf-8")
        return folder

    return make


class _Page(HTMLParser):
    """Collects what a browser would load and what a reader would see."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def _parsed(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def test_two_runs_side_by_side_give_every_figure_and_one_complete_page(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [make_run("aligned teacher", 0), make_run("mismatched", 1, steps=400)]
    (runs[0] / "summary.json").write_text(json.dumps({"gap_recovery": 0.81, "steps": 12, "nested": {"a": 1}}))
    output = tmp_path / "out" / "compare.html"
    write_report(runs, output)
    images = {path.stem: path for path in (tmp_path / "out" / "compare_figures").iterdir()}
    assert set(images) == FIGURES
    for path in images.values():
        content = path.read_bytes()
        assert content.startswith(PNG) and 10_000 < len(content) < 300_000
    page = _parsed(output)
    assert page.tags.count("img") == len(FIGURES) and "script" not in page.tags and "link" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    embedded = {base64.b64decode(source.split(",", 1)[1]) for source in page.sources}
    assert embedded == {path.read_bytes() for path in images.values()}
    assert "url(" not in output.read_text() and "@import" not in output.read_text()
    assert {"aligned teacher", "mismatched", "gap_recovery", "0.81", "1 to 400"} <= set(page.text)
    first, last = _record(1, 0)["distill/overlap_ratio"], _record(12, 0)["distill/overlap_ratio"]
    assert f"{first:.4g} to {last:.4g}" in page.text


def with_events(run: Path, *events: dict[str, Any]) -> Path:
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return run


def alarm(step: int, name: str = "gradient_spike") -> dict[str, Any]:
    told = {"evidence": f"norm at {step}", "remedy": "lower <optim.lr>", "section": "6.1", "numbers": {"norm": 3.0}}
    return {"event": "alarm", "step": step, "name": name} | told


def evaluation(step: int, accuracy: float) -> dict[str, Any]:
    return {"event": "evaluation", "step": step, "results": {"accuracy/heldout": accuracy}}


def test_alarms_are_marks_on_the_figures_and_a_table_on_the_page(make_run: Callable[..., Path], tmp_path: Path) -> None:
    keep = ("optim/", "timing/")
    runs = [make_run("left", keep=keep), make_run("right", 1, keep=keep)]
    write_report(runs, tmp_path / "plain.html")
    assert "None was raised." in _parsed(tmp_path / "plain.html").text
    with_events(runs[0], alarm(3), *(alarm(step, "length_explosion") for step in range(4, 12)))
    with_events(runs[1], alarm(7, "eos_mismatch"))
    assert [[found.number for found in run.alarms] for run in read_runs(runs)] == [list(range(1, 10)), [10]]
    write_report(runs, tmp_path / "marked.html")
    page = _parsed(tmp_path / "marked.html")
    assert {"10", "right", "7", "eos_mismatch", "norm at 7", "lower <optim.lr>", "6.1"} <= set(page.text)
    sizes = {}
    for name in ("plain", "marked"):
        content = (tmp_path / f"{name}_figures/optimization.png").read_bytes()
        sizes[name] = int.from_bytes(content[20:24], "big")
    # Eight alarms are named below the panels, and one line says that there are more.
    assert 9 * 16 <= sizes["marked"] - sizes["plain"] <= 9 * 16 + 12


def test_what_a_resume_went_back_behind_is_forgotten(make_run: Callable[..., Path]) -> None:
    run = with_events(
        make_run("run"),
        *(evaluation(0, 0.25), alarm(2), evaluation(5, 0.75), alarm(6), {"event": "resume", "step": 4}),
        *(alarm(8), evaluation(10, 0.5), {"event": "end", "step": 12}),
    )
    (found,) = read_runs([run])
    assert [(item.number, item.step) for item in found.alarms] == [(1, 2), (2, 8)]
    series = found.series("evaluation/accuracy/heldout")
    assert series is not None and (series.steps, series.values) == ([0, 10], [0.25, 0.5])


def test_evaluations_have_a_figure_of_their_own(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("run", keep=("loss/",))
    with_events(run, evaluation(0, 0.25), evaluation(12, 0.5))
    write_report([run], tmp_path / "report.html")
    assert "Evaluations" in _parsed(tmp_path / "report.html").text
    assert (tmp_path / "report_figures/evaluations.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("num_runs", [1, 3, 4])
def test_heat_maps_have_one_panel_per_metric_and_run(
    num_runs: int, make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    place = positions.grid
    monkeypatch.setattr(positions, "grid", lambda count, *a, **k: asked.append((count, k)) or place(count, *a, **k))
    runs = read_runs([make_run(f"run{seed}", seed, steps=3) for seed in range(num_runs)])
    assert positions.draw_heat_maps(runs, HEAT_MAPS, "title", tmp_path / "maps.png")
    ((cells, options),) = asked
    # Rows of three at most; a metric does not share a row with another.
    assert options["num_columns"] == min(num_runs, 3) and cells == 3 * {1: 1, 3: 3, 4: 6}[num_runs]


@pytest.mark.parametrize(
    ("rewards", "title"),
    [
        ({"correct": [-0.1, 0.0], "incorrect": [-0.3, -0.1]}, "run, AUROC 0.875"),
        ({"correct": [0.5, 0.5]}, "run"),
    ],
)
def test_rewards_of_both_classes_have_their_auroc_where_there_are_both(
    rewards: dict[str, list[float]], title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = []
    monkeypatch.setattr(reward_figure, "dress", lambda ax, name, *labels: titles.append(name))
    record = {"step": 1} | {f"outcome/rewards_{name}": values for name, values in rewards.items()}
    run = Run(name="run", records=[record], summary={})
    assert reward_figure.draw_rewards([run], "title", tmp_path / "rewards.png")
    assert titles == [title] and (tmp_path / "rewards.png").is_file()
    assert not reward_figure.draw_rewards(
        [Run(name="a", records=[{"step": 1}], summary={})], "t", tmp_path / "rewards.png"
    )
    assert not (tmp_path / "rewards.png").exists()


def test_a_single_step_is_a_curve_and_no_map(make_run: Callable[..., Path], tmp_path: Path) -> None:
    write_report([make_run("run", steps=1, keep=("distill/entropy_student", "distill/position"))], tmp_path / "r.html")
    names = {path.stem for path in (tmp_path / "r_figures").iterdir()}
    assert "by_position" in names and "heat_maps" not in names


def test_the_same_runs_give_the_same_bytes(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("run", keep=("loss/", "timing/"))
    write_report([run], tmp_path / "a.html")
    write_report([run], tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_metric_nobody_measured_leaves_its_figure_out_and_an_old_one_is_removed(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "report.html"
    write_report([make_run("timed", keep=("loss/obj", "timing/"))], output)
    assert {path.stem for path in (tmp_path / "report_figures").iterdir()} == {"optimization", "timing"}
    write_report([make_run("massive", keep=("loss/obj", "distill/overlap_mass"))], output)
    assert {path.stem for path in (tmp_path / "report_figures").iterdir()} == {"optimization", "dynamics"}
    assert "Where the time goes" not in output.read_text()


def test_a_run_without_a_metric_says_so_beside_one_that_has_it(make_run: Callable[..., Path], tmp_path: Path) -> None:
    write_report(
        [make_run("full", keep=("loss/", "distill/overlap_mass")), make_run("no entropy", 1, keep=("loss/",))],
        tmp_path / "report.html",
    )
    assert "not measured" in _parsed(tmp_path / "report.html").text


def test_a_folder_as_output_gets_the_page_inside(make_run: Callable[..., Path], tmp_path: Path) -> None:
    write_report([make_run("run", keep=("loss/", "timing/"))], tmp_path / "folder")
    assert (tmp_path / "folder" / "report.html").is_file()


def test_names_that_mean_something_to_html_or_mathematics_are_only_names(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    keep = ("loss/", "timing/")
    names = ("a<b>&$x^$", "_hidden", "other/a<b>&$x^$")
    runs = [make_run(name, seed, keep=keep) for seed, name in enumerate(names)]
    write_report(runs, tmp_path / "report.html")
    page = _parsed(tmp_path / "report.html")
    assert "b" not in page.tags and "other/a<b>&$x^$" in page.text and "_hidden" in page.text


def test_equal_folder_names_are_told_apart(make_run: Callable[..., Path]) -> None:
    runs = read_runs([make_run("left/run"), make_run("right/run"), make_run("third")])
    assert [run.name for run in runs] == ["left/run", "right/run", "third"]


def test_a_repeated_step_counts_once_and_an_unfinished_line_not_at_all(make_run: Callable[..., Path]) -> None:
    again = json.dumps({"step": 2, "loss/objective": 9.0}) + "\n" + '{"step": 13, "loss/ob'
    (run,) = read_runs([make_run("run", tail=again)])
    assert [record["step"] for record in run.records] == list(range(1, 13))
    series = run.series("loss/objective")
    assert series is not None and series.values[1] == 9.0


def test_only_finite_numbers_make_a_series(make_run: Callable[..., Path]) -> None:
    tail = "".join(f'{{"step": {step}, "odd": {value}}}\n' for step, value in enumerate(
        ["1.5", "NaN", "null", '"x"', "true", "Infinity", "2"], start=20
    ))  # fmt: skip
    (run,) = read_runs([make_run("run", tail=tail)])
    series = run.series("odd")
    assert series is not None and (series.steps, series.values) == ([20, 26], [1.5, 2.0])
    assert run.series("absent") is None


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        ("{not json}\n", r"metrics\.jsonl:3: is not JSON"),
        ("[1, 2]\n", r"metrics\.jsonl:3: is a list, not a JSON object"),
        ('{"loss/objective": 1.0}\n', r'metrics\.jsonl:3: "step" is None'),
        ('{"step": true}\n', r'metrics\.jsonl:3: "step" is True'),
        (
            '{"step": 9, "distill/entropy_gap/by_position": [1.0], "distill/position_edges": [0, 16]}\n',
            r"run run, step 9: distill/entropy_gap/by_position does not fit",
        ),
    ],
)
def test_a_broken_file_is_named_in_one_line(
    make_run: Callable[..., Path], tmp_path: Path, tail: str, words: str
) -> None:
    run = make_run("run", steps=2, keep=("loss/",), tail=tail)
    with pytest.raises(ConfigError, match=words) as error:
        write_report([run], tmp_path / "report.html")
    assert "\n" not in error.value.message


def test_a_missing_or_empty_run_is_named(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match=re.escape(str(missing / "metrics.jsonl")) + ".*cannot be read"):
        write_report([missing], tmp_path / "report.html")
    empty = make_run("empty", steps=0)
    with pytest.raises(ConfigError, match=re.escape(str(empty / "metrics.jsonl")) + ".*no finished step"):
        write_report([empty], tmp_path / "report.html")
    (empty / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ConfigError, match="is not text"):
        write_report([empty], tmp_path / "report.html")
    with pytest.raises(ConfigError, match="at least one run folder"):
        write_report([], tmp_path / "report.html")


def test_a_place_that_cannot_be_written_is_named(make_run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"file.*cannot be written"):
        write_report([make_run("run")], tmp_path / "file" / "report.html")
