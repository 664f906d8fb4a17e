"""A whole preflight over tiny models: numbers, refusals, resuming, the report."""

import json
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from opd.errors import ConfigError
from opd.settings import load_settings
from services.trainer.recipes.preflight.command import preflight
from services.trainer.recipes.preflight.document import Grid, Heading, Text, html, markdown
from services.trainer.recipes.preflight.findings import Findings
from services.trainer.recipes.preflight.page import print_findings
from services.trainer.recipes.preflight.records import RecordFile
from services.trainer.recipes.preflight.settings import PreflightSettings
from services.trainer.recipes.preflight.teachers import name_teachers
from services.trainer.recipes.self_distillation.settings import TeacherKind
from services.trainer.run_log import read_steps
from services.trainer.stop import StopSignal
from services.trainer.templates import get_template
from tests.unit.trainer.tiny_training import NUM_IDS, tiny_model, tiny_tokenizer

NUM_PROMPTS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`student/`, its copy `same/`, `other/` of other weights, `foreign/` of another vocabulary, `prompts.jsonl`."""
    folder = tmp_path_factory.mktemp("preflight")
    for name, seed in (("student", 1), ("same", 1), ("other", 2)):
        tiny_model(seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    tiny_model(3, vocab=NUM_IDS + 2).save_pretrained(folder / "foreign")
    tiny_tokenizer(NUM_IDS + 2).save_pretrained(folder / "foreign")
    rows = [
        {"prompt": get_template("boxed").render(f"w{2 + i} w9"), "reward_model": {"ground_truth": f"w{i}"}}
        for i in range(NUM_PROMPTS + 2)
    ]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder


def settings_of(world: Path, output: Path, *teachers: str, **changes: Any) -> PreflightSettings:
    values = {
        "student": str(world / "student"),
        "teachers": [str(world / name) for name in teachers],
        "prompts": [str(world / "prompts.jsonl")],
        "num_prompts": NUM_PROMPTS,
        "template_prompts": 4,
        "batch_rollouts": 6,
        "probe_rollouts": 4,
        "max_response_tokens": 8,
        "device": "cpu",
        "objective": {"score_top_k": 5},
        "output_dir": str(output),
    }
    return PreflightSettings.model_validate(values | changes)


def run(settings: PreflightSettings) -> Findings:
    return preflight(settings, Console(file=StringIO()), StopSignal())


@pytest.fixture(scope="module")
def found(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Findings, Path]]:
    output = tmp_path_factory.mktemp("output")
    yield run(settings_of(world, output, "other", "same", "foreign")), output


def test_a_copy_of_the_student_has_nothing_to_teach(found: tuple[Findings, Path]) -> None:
    other, same, foreign = found[0].teachers
    for name, value in (("reverse_kl", 0.0), ("overlap_ratio", 1.0), ("entropy_gap", 0.0), ("mass99_overlap", 1.0)):
        assert same.metrics[name].value == pytest.approx(value, abs=1e-5)
    assert same.metrics["overlap_mass_student"].value == pytest.approx(same.metrics["overlap_mass_teacher"].value)
    assert same.gap is not None
    # Equal weights and equal seeds give equal answers.
    assert (same.gap.value, same.gap.low, same.gap.high) == (0.0, 0.0, 0.0)
    assert other.metrics["reverse_kl"].low > 0.05
    assert other.metrics["overlap_ratio"].high < 0.9
    assert other.gradient is not None and same.gradient is not None
    assert other.gradient.grad_norm > 100 * same.gradient.grad_norm
    assert foreign.metrics == {}


def test_a_teacher_of_another_vocabulary_is_refused_and_comes_last(found: tuple[Findings, Path]) -> None:
    foreign = found[0].teachers[2]
    assert "map ids to different tokens" in foreign.refusal
    assert [(item.name, item.predicted) for item in found[0].ranking][-1] == ("foreign", "none")


def test_without_a_pilot_new_knowledge_cannot_be_told(found: tuple[Findings, Path]) -> None:
    judgements = [teacher.new_knowledge for teacher in found[0].teachers[:2]]
    assert {str(judgement.verdict) for judgement in judgements if judgement} == {"cannot be told"}


def test_curves_by_position_hold_every_position_once(found: tuple[Findings, Path]) -> None:
    teacher = found[0].teachers[0]
    points = teacher.by_position["reverse_kl"]
    count = sum(point.count for point in points)
    mean = sum(point.value * point.count for point in points) / count
    assert mean == pytest.approx(teacher.metrics["reverse_kl"].value, rel=1e-9)
    assert count == round(found[0].mean_tokens * found[0].num_prompts * found[0].rollouts_per_prompt)


def test_templates_are_compared_with_the_prompts_as_they_are(found: tuple[Findings, Path]) -> None:
    assert found[0].same_as_is == ("boxed",)
    assert set(found[0].teachers[0].templates) == {"dapo"}
    assert found[0].teachers[2].templates == {}
    assert set(found[0].student_accuracy) == {"as-is", "dapo"}


def test_the_report_says_what_auroc_is_worth_and_embeds_its_figure(found: tuple[Findings, Path]) -> None:
    _, output = found
    texts = {end: (output / f"preflight.{end}").read_text(encoding="utf-8") for end in ("md", "html", "json")}
    for end in ("md", "html"):
        assert "no evidence of success" in texts[end]
        assert "map ids to different tokens" in texts[end]
    assert 'src="data:image/png;base64,' in texts["html"]
    assert (output / "by_position.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads(texts["json"])
    assert record["settings"]["thresholds"]["overlap_mass"] == 0.97
    assert [teacher["name"] for teacher in record["teachers"]] == ["other", "same", "foreign"]


def test_the_tables_fit_eighty_columns(found: tuple[Findings, Path]) -> None:
    text = StringIO()
    print_findings(found[0], Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    # No cell was broken over two lines.
    assert [line.split()[:2] for line in lines if line.startswith(" reverse KL")] == [["reverse", "KL"]]
    assert any(re.match(r" overlap ratio, eq 6 .*0\.\d{3} ±0\.\d{3}", line) for line in lines)


def test_a_preflight_that_was_cut_off_goes_on_to_the_same_end(world: Path, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path / "whole", "other")
    whole = run(settings)
    path = next((tmp_path / "whole").glob("records-*.jsonl"))
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / path.name).write_text("".join(lines[:4]) + lines[4][:30], encoding="utf-8")
    resumed = run(settings.model_copy(update={"output_dir": cut}))
    again = (cut / path.name).read_text(encoding="utf-8").splitlines(keepends=True)
    assert again[:4] == lines[:4]
    assert len(again) == len(lines)
    one, other = whole.teachers[0], resumed.teachers[0]
    for name, estimate in one.metrics.items():
        assert estimate.value == pytest.approx(other.metrics[name].value, rel=1e-4, abs=1e-6)
    assert one.accuracy == other.accuracy


def test_what_is_finished_is_not_measured_again_and_other_settings_are_another_preflight(
    world: Path, tmp_path: Path
) -> None:
    settings = settings_of(world, tmp_path, "same", templates=())
    run(settings)
    path = next(tmp_path.glob("records-*.jsonl"))
    before = path.stat().st_mtime_ns
    run(settings)
    assert path.stat().st_mtime_ns == before
    run(settings.model_copy(update={"seed": 1}))
    assert len(list(tmp_path.glob("records-*.jsonl"))) == 2


def test_a_pilot_is_a_training_run_that_goes_on_and_is_not_repeated(world: Path, tmp_path: Path) -> None:
    pilot = {"steps": 5, "prompts_per_step": 2, "rollouts_per_prompt": 2, "lr": 3e-3, "warmup_steps": 9}
    settings = settings_of(world, tmp_path, "other", templates=(), pilot=pilot, max_prompt_tokens=40)
    first = run(settings).teachers[0]
    assert first.pilot is not None and first.pilot.num_steps == 5
    assert first.pilot.reverse_kl is not None and first.pilot.accuracy is not None and first.pilot.gain is not None
    assert first.new_knowledge is not None and first.new_knowledge.evidence
    folder = next(tmp_path.glob("pilot-other-*"))
    values = [record["loss/reverse_kl"] for record in read_steps(folder)]
    assert first.pilot.reverse_kl.value == pytest.approx(np.polyfit(range(5), values, 1)[0], rel=1e-6)
    lines = [json.loads(line) for line in next(tmp_path.glob("records-*.jsonl")).read_text().splitlines()]
    after = [line["is_correct"] for line in lines if line.get("model") == folder.name]
    student = [line["is_correct"] for line in lines if line["kind"] == "prompt"]
    assert len(after) == len(student) == NUM_PROMPTS
    assert first.pilot.gain.value == pytest.approx(np.mean(after) - np.mean(student), abs=1e-12)
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    assert run(settings).teachers[0].pilot == first.pilot
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before


def test_teachers_are_folders_pools_and_urls(world: Path) -> None:
    given = (str(world / "other"), "math", "grpc://127.0.0.1:1#math", "redis://127.0.0.1:1", "org/model")
    settings = PreflightSettings(student="s", teachers=given, prompts=("p",), tenant="lab")
    named = name_teachers(settings)
    assert [teacher.name for teacher in named] == ["other", "math", "math~2", "teacher", "model"]
    kinds = [teacher.settings.kind for teacher in named]
    assert kinds == [TeacherKind.FOLDER, *[TeacherKind.POOL] * 3, TeacherKind.FOLDER]
    assert [teacher.settings.url for teacher in named[1:4]] == ["", "grpc://127.0.0.1:1", "redis://127.0.0.1:1"]
    assert {teacher.settings.tenant for teacher in named[1:4]} == {"lab"}
    with pytest.raises(ConfigError, match="one is named twice"):
        name_teachers(settings.model_copy(update={"teachers": ("math", "math")}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe_rollouts": 9}, "probe_rollouts=9 is above batch_rollouts=6"),
        ({"objective": {"kind": "full_vocabulary"}}, "objective.kind=full_vocabulary: a preflight asks for top-k"),
        (
            {"objective": {"horizon": {"start": 5000}}},
            "objective.horizon.start=5000 is above rollout.max_resp",
        ),
        ({"templates": ("chatty",)}, "template: unknown name 'chatty'"),
    ],
)
def test_what_makes_no_sense_is_one_line(world: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(settings_of(world, tmp_path, "other", **changes))


def test_no_teacher_and_no_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="teachers"):
        load_settings(PreflightSettings, None, ['student="s"', "teachers=[]", 'prompts=["p"]'])


def test_a_record_file_that_cannot_be_kept_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"output_dir=.*taken: cannot be used"):
        RecordFile.open(tmp_path / "taken", {})
    RecordFile.open(tmp_path, {}).path.write_text('{"kind": "prompt"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"records-.*\.jsonl: line 1 is no record; remove the file"):
        RecordFile.open(tmp_path, {})


def test_a_document_escapes_what_it_shows() -> None:
    blocks = [Heading(text="a <b>", level=1), Text(text="x & y"), Grid(rows=[["n|m", "v"], ["<i>", "1"]])]
    assert markdown(blocks) == "# a <b>\n\nx & y\n\n| n\\|m | v |\n| --- | --- |\n| <i> | 1 |\n"
    page = html("<t>", blocks)
    assert "<title>&lt;t&gt;</title>" in page
    assert "<td>&lt;i&gt;</td>" in page
