"""A whole preflight over tiny models: numbers, refusals, resuming, the report."""

import json
import re
import shutil
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from opd.errors import ConfigError
from opd.settings import load_settings
from services.trainer.prompt_files import prepare_prompts
from services.trainer.recipes.preflight.command import preflight
from services.trainer.recipes.preflight.document import Grid, Heading, Text, html, markdown
from services.trainer.recipes.preflight.findings import Findings
from services.trainer.recipes.preflight.page import print_findings
from services.trainer.recipes.preflight.prompt_sets import draw_prompts
from services.trainer.recipes.preflight.records import RecordFile
from services.trainer.recipes.preflight.settings import PreflightSettings
from services.trainer.recipes.preflight.teachers import name_teachers, train_settings
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


@pytest.mark.parametrize("name", ["student", "other"])
def test_responses_that_end_at_another_token_are_measured_anew(world: Path, tmp_path: Path, name: str) -> None:
    for model in ("student", "other"):
        shutil.copytree(world / model, tmp_path / model)
    shutil.copy(world / "prompts.jsonl", tmp_path)
    settings = settings_of(tmp_path, tmp_path / "output", "other", templates=(), num_prompts=3)
    run(settings)
    config = tmp_path / name / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [1, 5]}), encoding="utf-8")
    run(settings)
    assert len(list((tmp_path / "output").glob("records-*.jsonl"))) == 2


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
    # Killed between the last line of metrics and the checkpoint: the steps are taken again, once.
    shutil.rmtree(folder / "checkpoints")
    again = run(settings).teachers[0].pilot
    assert again is not None and again.num_steps == 5
    assert [record["step"] for record in read_steps(folder)] == [1, 2, 3, 4, 5]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000005"]
    # Killed likewise, with an older checkpoint there.
    state = folder / "checkpoints" / "step-000005"
    state = state.rename(state.with_name("step-000003")) / "trainer" / "state.json"
    # Without a digest of its own, as a record of an earlier version is.
    record = {name: value for name, value in json.loads(state.read_text()).items() if name != "record_sha256"}
    state.write_text(json.dumps(record | {"step": 3}), encoding="utf-8")
    run(settings)
    assert (folder / "checkpoints" / "step-000005").is_dir()
    assert [record["step"] for record in read_steps(folder)] == [1, 2, 3, 4, 5]


def test_another_student_or_other_prompts_under_the_same_paths_begin_another_pilot(world: Path, tmp_path: Path) -> None:
    for name in ("student", "other"):
        shutil.copytree(world / name, tmp_path / name)
    prompts = (world / "prompts.jsonl").read_text(encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    pilot = {"steps": 1, "prompts_per_step": 1, "rollouts_per_prompt": 1}
    settings = settings_of(
        tmp_path, tmp_path / "output", "other", templates=(), num_prompts=1, pilot=pilot, max_prompt_tokens=40
    )
    small = settings.model_copy(update={"batch_rollouts": 2, "probe_rollouts": 2})

    def num_pilots() -> int:
        run(small)
        return len(list((tmp_path / "output").glob("pilot-other-*")))

    assert num_pilots() == num_pilots() == 1
    # Another answer to the same question changes what the pilot's accuracy means.
    (tmp_path / "prompts.jsonl").write_text(prompts.replace('"w7"', '"w8"'), encoding="utf-8")
    assert num_pilots() == 2
    tiny_model(4).save_pretrained(tmp_path / "student")
    assert num_pilots() == 3
    tiny_model(5).save_pretrained(tmp_path / "other")
    assert num_pilots() == 4


def chat_tokenizer(last: str) -> Any:
    """Its chat template ends in a word of its own and begins with w7 where it is told to think."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if thinks %}w7 {% endif %}" + tokenizer.chat_template.removesuffix("w2") + last
    return tokenizer


def test_everybody_is_asked_as_in_the_training_run(world: Path, tmp_path: Path) -> None:
    student = chat_tokenizer("w2")
    chat_tokenizer("w3").save_pretrained(tmp_path / "chat")
    ways: dict[str, Any] = {
        "chat_template_kwargs": {"thinks": True},
        "teacher_tokenizer": str(tmp_path / "chat"),
        "teacher_template": "dapo",
        "teacher_chat_template_kwargs": {},
    }
    digests = set()
    for number in range(len(ways) + 1):
        given = dict(list(ways.items())[:number])
        settings = settings_of(world, tmp_path / "output", "other", max_prompt_tokens=60, **given)
        sets = draw_prompts(settings, student)
        training = train_settings(settings, name_teachers(settings)[0].settings)
        trained = {told(prompt) for prompt in prepare_prompts(training, student).schedule.step_prompts(0)}
        assert {told(prompt) for prompt in sets.by_template["as-is"]} <= trained
        digests.add(sets.digest)
    assert len(digests) == len(ways) + 1
    last = sets.by_template["as-is"][0]
    assert (last.prompt_token_ids[0], last.prompt_token_ids[-1]) == (7, 2)
    assert (last.teacher_prompt_token_ids[0], last.teacher_prompt_token_ids[-1]) == (0, 3)


def told(prompt: Any) -> tuple[bytes, bytes]:
    return prompt.prompt_token_ids.tobytes(), prompt.teacher_prompt_token_ids.tobytes()


def test_teachers_asked_in_another_way_are_another_preflight(world: Path, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path, "same", templates=())
    as_student = run(settings).teachers[0].metrics["reverse_kl"].value
    in_dapo = run(settings.model_copy(update={"teacher_template": "dapo"})).teachers[0].metrics["reverse_kl"].value
    assert len(list(tmp_path.glob("records-*.jsonl"))) == 2
    # The student's own copy reads something else than the student did.
    assert as_student == pytest.approx(0.0, abs=1e-5) and in_dapo > 1e-3


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
        ({"objective": {"kind": "full_vocabulary"}}, "objective.kind=full_vocabulary: needs more than"),
        ({"objective": {"kind": "grpo"}}, "objective.kind=grpo: has no teacher to judge; choose top_k"),
        ({"objective": {"outcome": {"weight": 0.5}}}, "objective.outcome.weight=0.5: .* leave it at 0"),
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
