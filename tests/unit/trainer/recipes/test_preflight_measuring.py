"""Sums per prompt against plain float64 arithmetic on whole distributions."""

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from opd.types import Scores
from services.trainer.batch import ScoredRollout
from services.trainer.config import TeacherSettings
from services.trainer.recipes.preflight.findings import find_out
from services.trainer.recipes.preflight.measuring import ScoredByAll, teacher_record
from services.trainer.recipes.preflight.page import print_findings, write_report
from services.trainer.recipes.preflight.records import PromptRecord, RecordFile
from services.trainer.recipes.preflight.rules import Verdict
from services.trainer.recipes.preflight.settings import AS_IS, PreflightSettings
from services.trainer.recipes.preflight.teachers import MetTeacher
from tests.unit.trainer.recipes.scored_rollouts import K, scored
from tests.unit.trainer.tiny_training import TEACHER_INFO, reverse_kl, tiny_model

RESPONSES = ([7, 3, 8, 5, 11, 2, 9] * 3, [4, 4, 10])


def distributions(model: torch.nn.Module, item: ScoredRollout) -> np.ndarray:
    """[R, V] probabilities of every id at every response position."""
    prompt, response = item.rollout.prompt_token_ids, item.rollout.response_token_ids
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    with torch.no_grad():
        logits_LV = model(input_ids=ids[None]).logits[0].double()
    found: np.ndarray = logits_LV[prompt.size - 1 : -1].softmax(dim=-1).numpy()
    return found


def test_sums_are_over_all_positions_of_a_prompts_rollouts() -> None:
    student, teacher = tiny_model(1), tiny_model(2)
    items = [scored(student, teacher, [5, 9, 2], response) for response in RESPONSES]
    record = teacher_record([ScoredByAll(rollout=item.rollout, scores={"t": item.scores}) for item in items], "t")
    kl, ratio, mass, gap, rewards = [], [], [], [], []
    for item in items:
        student_RV, teacher_RV = distributions(student, item), distributions(teacher, item)
        sampled = item.rollout.response_token_ids
        logs = np.log(np.stack([student_RV, teacher_RV])[:, np.arange(sampled.size), sampled])
        rewards.append(float((logs[1] - logs[0]).mean()))
        for p, q in zip(student_RV, teacher_RV, strict=True):
            own, theirs = np.argsort(-p)[:K], np.argsort(-q)[:K]
            shared = np.intersect1d(own, theirs)
            kl.append(reverse_kl(np.log(p[own]), np.log(q[own])))
            ratio.append(shared.size / K)
            mass.append(p[shared].sum())
            gap.append(abs(float(-(p * np.log(p)).sum() + (q * np.log(q)).sum())))
    num_positions = sum(map(len, RESPONSES))
    for key, values in (
        ("loss/reverse_kl", kl),
        ("distill/overlap_ratio", ratio),
        ("distill/overlap_mass_student", mass),
        ("distill/entropy_gap", gap),
    ):
        total, count = record.metrics[key]
        assert count == num_positions
        assert total == pytest.approx(sum(values), rel=1e-4)
    assert record.rewards == pytest.approx(rewards, rel=1e-4)
    totals, counts = record.by_position["loss/reverse_kl"]
    first = [value for index, value in enumerate(kl) if index < 16 or index >= len(RESPONSES[0])]
    assert counts[:2] == [16.0 + 3.0, 5.0]
    assert totals[0] == pytest.approx(sum(first), rel=1e-4)


def test_a_teacher_that_scores_the_sampled_tokens_alone_is_reported_without_the_rest(tmp_path: Path) -> None:
    student, teacher = tiny_model(1), tiny_model(2)
    item = scored(student, teacher, [5, 9, 2], RESPONSES[0])
    sparse = ScoredByAll(rollout=item.rollout, scores={"t": Scores(sampled_logprobs=item.scores.sampled_logprobs)})
    records = RecordFile.open(tmp_path, {})
    for template in (AS_IS, "dapo"):
        records.add(
            PromptRecord(
                template=template, prompt=0, is_correct=[True], num_tokens=[21], is_truncated=[False],
                teachers={"t": teacher_record([sparse], "t")},
            )
        )  # fmt: skip
    met = MetTeacher(name="t", settings=TeacherSettings(pool="t"), info=TEACHER_INFO, router=None, loaded=None)
    settings = PreflightSettings(student="s", teachers=("t",), prompts=("p",))
    found = find_out(settings, "s", [met], records, {}, {}, ())
    (only,) = found.teachers
    assert "overlap_ratio" not in only.metrics and "reverse_kl" not in only.metrics
    assert only.compatible is not None and only.compatible.verdict is Verdict.CANNOT_BE_TOLD
    assert only.template_reason == "the overlap was not measured"
    text = StringIO()
    print_findings(found, Console(file=text, width=80))
    assert "cannot be told" in text.getvalue()
    assert all(path.is_file() for path in write_report(found, tmp_path, {}))
