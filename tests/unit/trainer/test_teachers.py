"""Several teachers by name: each prompt's rollouts go to its own, and no other's answer passes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from opd.errors import ConfigError, InternalError
from opd.types import Rollout, ScoreReply, Scores
from services.trainer.config import DataSettings, StudentSettings, TrainSettings
from services.trainer.prompts import TeacherColumn, load_problems
from services.trainer.teachers import NoTeachers, TeacherRouter
from tests.unit.trainer.test_batch import scored
from tests.unit.trainer.tiny_training import TEACHER_INFO, ExactClient, TinyPrompt, exact_scores, teacher_client
from tests.unit.trainer.tiny_training import tiny_model as model


def prompt(rollout: Rollout, teacher: str) -> TinyPrompt:
    ids = rollout.prompt_token_ids
    return TinyPrompt(prompt_token_ids=ids, teacher_prompt_token_ids=ids, teacher=teacher)


def two_teachers() -> tuple[TeacherRouter, dict[str, ExactClient]]:
    clients = {
        name: ExactClient(model=model(seed), current_info=dataclasses.replace(TEACHER_INFO, fingerprint=f"{name}-1"))
        for name, seed in (("code", 5), ("math", 6))
    }
    router = TeacherRouter({name: teacher_client(client) for name, client in clients.items()})
    router.shake_hands(wait_s=0)
    return router, clients


def test_each_rollout_is_scored_by_its_prompts_teacher() -> None:
    router, clients = two_teachers()
    assert router.pin() == {"code": "code-1", "math": "math-1"}
    rollout = scored("run.0.0", [5, 6, 7], [8, 9, 3, 1]).rollout
    answers = {}
    for name in clients:
        reply = router.send(rollout, prompt(rollout, name)).result()
        answers[name] = router.accept(rollout, prompt(rollout, name), reply).candidate_logprobs
        expected = exact_scores(clients[name].model, clients[name].requests[0]).candidate_logprobs
        np.testing.assert_array_equal(answers[name], expected)
    assert not np.allclose(answers["code"], answers["math"])


def test_another_teachers_answer_is_refused() -> None:
    router, _ = two_teachers()
    rollout = scored("run.0.0", [5, 6, 7], [8, 9, 3, 1]).rollout
    reply: ScoreReply = router.send(rollout, prompt(rollout, "code")).result()
    with pytest.raises(InternalError, match=r"scored by teacher code-1 and not by the pinned math-1"):
        router.accept(rollout, prompt(rollout, "math"), reply)


def test_a_teacher_nobody_knows() -> None:
    router, _ = two_teachers()
    rollout = scored("run.0.0", [5, 6, 7], [8, 9, 3, 1]).rollout
    with pytest.raises(ConfigError, match=r"^teacher 'law' of a prompt: is none of code, math"):
        router.send(rollout, prompt(rollout, "law"))


def test_one_teachers_upgrade_leaves_the_other_pinned() -> None:
    router, clients = two_teachers()
    clients["math"].current_info = dataclasses.replace(TEACHER_INFO, fingerprint="math-2")
    assert router.pin() == {"code": "code-1", "math": "math-2"}


def settings(**changes: object) -> TrainSettings:
    values: dict[str, object] = {
        "student": StudentSettings(model="m"),
        "data": {"files": ("a.jsonl",), "teacher_column": "who"},
        "teacher": {"pool": "big", "tenant": "me", "url": "redis://a/0", "timeout_s": 7},
        "teachers": {"math": {"url": "redis://b/0"}, "code": {"pool": "coder"}},
    }
    return TrainSettings.model_validate(values | changes)


def test_a_named_teacher_takes_from_teacher_what_it_does_not_say() -> None:
    found = settings().teachers_by_name()
    assert list(found) == ["math", "code"]
    assert (found["math"].pool, found["math"].url, found["math"].tenant) == ("math", "redis://b/0", "me")
    assert (found["code"].pool, found["code"].url, found["code"].timeout_s) == ("coder", "redis://a/0", 7)


def test_a_single_teacher_has_no_name() -> None:
    alone = settings(teachers={}, data=DataSettings(files=("a.jsonl",)))
    assert alone.teachers_by_name() == {"": alone.teacher}


def test_teachers_and_their_column_come_together() -> None:
    with pytest.raises(ValidationError, match=r"data\.teacher_column=who: there are no teachers to name"):
        settings(teachers={})
    with pytest.raises(ValidationError, match=r"teachers=math, code: no column says which rows are whose"):
        settings(data={"files": ("a.jsonl",)})
    with pytest.raises(ValidationError, match="is not a name"):
        settings(teachers={"Math!": {}})


def write_rows(path: Path, *names: object) -> str:
    rows = [{"prompt": "hello"} | ({} if name is None else {"who": name}) for name in names]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


COLUMN = TeacherColumn(name="who", teachers=("math", "code"))


def test_rows_name_their_teacher(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", "math", "code", "math")
    assert [problem.teacher for problem in load_problems(data, teacher_column=COLUMN)] == ["math", "code", "math"]
    assert [problem.teacher for problem in load_problems(data)] == ["", "", ""]


@pytest.mark.parametrize(("name", "found"), [("law", "'law'"), (None, "missing"), (3, "3")])
def test_an_unknown_teacher_is_refused_naming_row_value_and_the_known(tmp_path: Path, name: object, found: str) -> None:
    data = write_rows(tmp_path / "a.jsonl", "math", name)
    message = rf"a\.jsonl: row 1: column who is {found}; give one of the configured teachers: code, math$"
    with pytest.raises(ConfigError, match=message):
        load_problems(data, teacher_column=COLUMN)


def test_every_teachers_willingness_is_tried_under_an_id_of_its_own() -> None:
    router, clients = two_teachers()
    router.try_scoring("probe-7.0")
    asked = [request.rollout_id for client in clients.values() for request in client.requests]
    assert asked == ["probe-7.0.0", "probe-7.0.1"]


def test_nobody_says_nothing() -> None:
    nobody, rollout = NoTeachers(), scored("run.0.0", [5, 6], [8, 9]).rollout
    reply = nobody.send(rollout, prompt(rollout, "")).result(timeout=0)
    assert nobody.accept(rollout, prompt(rollout, ""), reply) == Scores()
    assert nobody.pin() == {}
