"""The trainer's configuration: the paper's defaults, and refusals that name field, value and way out."""

import subprocess
import sys
from pathlib import Path

import pytest

from opd.errors import ConfigError
from opd.settings import Settings, load_settings
from services.trainer.config import TrainSettings
from services.trainer.recipes.cold_start.config import ColdStartSettings
from services.trainer.recipes.data.config import DataRecipeSettings
from services.trainer.recipes.preflight.settings import PreflightSettings
from services.trainer.run import run_training

ROOT = Path(__file__).parents[3]
ENOUGH = ["student.model=student", 'data.files=["prompts.jsonl"]']


def load(*overrides: str) -> TrainSettings:
    return load_settings(TrainSettings, None, [*ENOUGH, *overrides])


def test_defaults_are_those_of_table_2() -> None:
    found = load()
    rollout = found.rollout
    assert (rollout.prompts_per_step, rollout.rollouts_per_prompt) == (64, 4)
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1.0, -1)
    assert (rollout.max_prompt_tokens, rollout.max_response_tokens) == (1024, 7168)
    assert (found.objective.score_top_k, found.objective.support.value) == (16, "student")
    assert (found.optim.lr, found.optim.betas, found.optim.weight_decay) == (1e-6, (0.9, 0.999), 0.01)
    assert (found.optim.max_grad_norm, found.optim.warmup_steps, found.data.num_epochs) == (1.0, 0, 1)
    evaluation = found.evaluation
    assert (evaluation.num_samples, evaluation.temperature, evaluation.top_p) == (16, 0.7, 0.95)
    assert evaluation.max_response_tokens == 31744


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"^optim\.lrr: no such key; did you mean lr\?$"),
        ("steps=many", r"^steps='many': input should be a valid integer"),
        ("seed=-1", r"^seed=-1: input should be greater than or equal to 0$"),
        ("seed=9223372036854775808", r"^seed=9223372036854775808: input should be less than"),
        ("steps=0", r"^steps=0: input should be greater than or equal to 1$"),
        ("optim.lr=0", r"^optim\.lr=0: input should be greater than 0$"),
        ("optim.lr=nan", r"^optim\.lr=nan: input should be a finite number"),
        ("teacher.pool=My_Pool", r"^teacher\.pool='My_Pool': is not a name; use 1 to 63 of lower-case letters"),
        ("teacher.tenant=", r"^teacher\.tenant=None: "),
        ("teacher.on_score_failure=ignore", r"^teacher\.on_score_failure='ignore': input should be 'abort' or 'drop'$"),
        ("rollout.top_k=0", r"^rollout\.top_k=0: is no number of tokens; give 1 or more, or -1 for all$"),
        ("rollout.temperature=0", r"^rollout\.temperature=0: input should be greater than 0$"),
        ("http.port=70000", r"^http\.port=70000: input should be less than or equal to 65535$"),
        ("pipeline.mode=lazy", r"^pipeline\.mode='lazy': input should be 'streaming' or 'sequential'$"),
        ("pipeline.max_policy_lag=3", r"^pipeline\.max_policy_lag=3: input should be less than or equal to 2$"),
        (
            "pipeline.max_policy_lag=1",
            r"^pipeline\.max_policy_lag=1: .*; set objective\.staleness_cap",
        ),
        ("data.overlong=cut", r"^data\.overlong='cut': input should be 'filter' or 'refuse'$"),
        ("data.files=[]", r"^data\.files=\[\]: is empty; give the files that hold the prompts$"),
        ("evaluation.every_steps=5", r"^evaluation\.every_steps=5 has nothing to evaluate on; set evaluation\.files$"),
        (
            "objective.kind=full_vocabulary",
            r"^objective\.kind=full_vocabulary with teacher\.url=.*over gRPC alone; set",
        ),
        ("objective.renormalize=false", r"objective\.renormalize=false with gradient=exact is no divergence"),
    ],
)
def test_what_is_wrong_is_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(override)
    assert "\n" not in str(caught.value)


def test_fields_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^optim\.warmup_steps=9 is above steps=5, .*; lower it$"):
        load("steps=5", "optim.warmup_steps=9")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.tail=bucket"], r"objective\.tail=bucket with teacher\.encoding=float16: .*; set .*=float32$"),
        (
            ["objective.kind=grpo", "rollout.rollouts_per_prompt=1"],
            r"rollout\.rollouts_per_prompt=1: .*; give 2 or more$",
        ),
        (
            ["objective.outcome.weight=0.5", "rollout.rollouts_per_prompt=1"],
            r"rollout\.rollouts_per_prompt=1: .*; give 2 or more$",
        ),
        (
            ["objective.kind=grpo", "teachers.math.pool=math", "data.teacher_column=t"],
            r"objective\.kind=grpo has no teacher: remove \[teachers\]",
        ),
        (["objective.kind=grpo", "teacher.url=redis://h"], r"^teacher\.url with objective\.kind=grpo, which asks no"),
        (
            ["data.teacher_context_column=solution"],
            r"^data\.teacher_context_column=solution: data\.teacher_context has no \{context\} for it to fill; put",
        ),
        (
            ["data.teacher_context_column=solution", "data.teacher_context={answer}"],
            r"^data\.teacher_context_column=solution: data\.teacher_context has no \{context\}",
        ),
        (["objective.kind=grpo", "teacher.kind=self"], r"^teacher\.kind=self with objective\.kind=grpo, which has no"),
        (
            ["objective.kind=grpo", "teacher.kind=self", "teacher.ema_decay=0.9"],
            r"^teacher\.kind=self with objective\.kind=grpo, which has no teacher: leave",
        ),
        (
            ["objective.kind=grpo", "teacher.kind=folder", "teacher.model=x"],
            r"^teacher\.kind=folder with objective\.kind=grpo, which has no teacher: leave",
        ),
        (
            ["objective.kind=grpo", "data.teacher_context={answer}", "data.teacher_tokenizer=x"],
            r"^data\.teacher_tokenizer, data\.teacher_context with objective\.kind=grpo, .*: remove it, or choose",
        ),
        (
            ["objective.kind=grpo", 'alarms.stop=["gradient_spike", "overlap_collapse", "small_supports"]'],
            r"^alarms\.stop=overlap_collapse, small_supports with objective\.kind=grpo: .*; take it out",
        ),
        (
            ["objective.horizon.start=17", "rollout.max_response_tokens=16"],
            r"^objective\.horizon\.start=17 is above rollout\.max_response_tokens=16, .*: lower it",
        ),
        (
            ["objective.kind=sampled_token", "rollout.top_p=0.9"],
            r"^rollout\.top_p=0\.9 with objective\.kind=sampled_token biases the estimate, .*: set rollout\.top_p=1\.0",
        ),
        (["objective.kind=grpo", "rollout.top_k=20"], r"^rollout\.top_k=20 with objective\.kind=grpo .*top_k=-1, or"),
        (
            ["objective.outcome.weight=0.5", "rollout.top_k=20"],
            r"^rollout\.top_k=20 with objective\.outcome\.weight=0\.5",
        ),
        (["objective.credit=to_go", "rollout.top_p=0.9"], r"^rollout\.top_p=0\.9 with objective\.credit=to_go biases"),
    ],
)
def test_what_an_objective_needs_of_the_rest_is_asked_for(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(*overrides)


def test_a_divergence_on_a_support_may_be_trained_on_a_cut_sampler() -> None:
    assert load("rollout.top_p=0.9", "rollout.top_k=20").rollout.top_k == 20


def test_what_is_not_ignored_is_not_refused() -> None:
    assert load("objective.kind=grpo", 'alarms.stop=["gradient_spike", "length_explosion"]').alarms.stop
    assert load("objective.horizon.start=16", "rollout.max_response_tokens=16").objective.horizon
    assert load("objective.tail=bucket", "teacher.kind=self").teacher.encoding == "float16"


@pytest.mark.parametrize("settings", [PreflightSettings, ColdStartSettings, DataRecipeSettings])
def test_no_recipe_takes_a_seed_below_zero(settings: type[Settings]) -> None:
    with pytest.raises(ConfigError, match=r"(^|; )seed=-1: input should be greater than or equal to 0($|;)"):
        load_settings(settings, None, ["seed=-1"])


def test_grpo_has_groups_of_eight_unless_told() -> None:
    assert load("objective.kind=grpo").rollout.rollouts_per_prompt == 8
    assert load("objective.kind=grpo", "rollout.rollouts_per_prompt=4").rollout.rollouts_per_prompt == 4
    assert load("objective.outcome.weight=0.5").rollout.rollouts_per_prompt == 4
    assert load("teacher.encoding=float32", "objective.tail=bucket").objective.tail == "bucket"


def test_every_setting_is_explained() -> None:
    def silent(section: type[Settings], prefix: str) -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Settings):
                assert kind.__doc__
                found += silent(kind, f"{prefix}{name}.")
            elif name != "objective" and not field.description:
                found.append(f"{prefix}{name}")
        return found

    assert silent(TrainSettings, "") == []


def test_a_file_and_overrides_make_one_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('steps = 3\n[student]\nmodel = "s"\n[data]\nfiles = ["p.jsonl"]\n[optim]\nlr = 0.5\n')
    found = load_settings(TrainSettings, path, ["optim.lr=0.25"])
    assert (found.steps, found.optim.lr, found.student.model) == (3, 0.25, "s")
    assert TrainSettings.model_validate_json(found.model_dump_json()) == found


def test_a_wrong_configuration_is_exit_code_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_training(None, [*ENOUGH, "optim.lrr=1"], resume=False) == 2
    assert capsys.readouterr().err == "opd train: optim.lrr: no such key; did you mean lr?\n"


def test_a_configuration_is_refused_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom services.trainer.run import run_training\n"
        "assert run_training(None, ['x=1'], resume=False) == 2\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'datasets', 'pyarrow', 'math_verify'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30, capture_output=True)


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (
            "pipeline.mode=sequential",
            r"^pipeline\.max_policy_lag=1 with mode=sequential: .* set pipeline\.mode=streaming",
        ),
        ("objective.kind=full_vocabulary", r"^pipeline\.max_policy_lag=1 with objective\.kind=full_vocabulary: "),
        ("deterministic=true", r"^pipeline\.max_policy_lag=1 with deterministic=true: .* set one of them back$"),
    ],
)
def test_a_lag_is_refused_where_it_cannot_be(further: str, message: str) -> None:
    lagged = ["pipeline.max_policy_lag=1", "objective.staleness_cap=2"]
    assert load(*lagged).pipeline.max_policy_lag == 1
    with pytest.raises(ConfigError, match=message):
        load(*lagged, "teacher.url=grpc://127.0.0.1:1", further)
