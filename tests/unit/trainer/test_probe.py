"""The gradient probe in a real loop of tiny models, against gradients taken one by one in float64."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd.errors import CheckpointError, InternalError
from services.trainer.batch import ScoredRollout, build_batch
from services.trainer.loop import StepRecord
from services.trainer.objectives.config import ObjectiveConfig
from services.trainer.probe import PROBE_FILE, GradientProbe, StoredProbe, read_probe, remove_probe, spread, write_probe
from tests.unit.trainer.test_batch import scored
from tests.unit.trainer.tiny_training import Setup

KEY = "distill/gradient_coherence"


@pytest.fixture(scope="module")
def trained() -> tuple[Setup, list[StepRecord]]:
    setup = Setup(num_steps=4, prompts_per_step=5, rollouts_per_prompt=2)
    loop, records = setup.loop(), []
    loop.run(records.append)
    return setup, records


def make_probe(setup: Setup, folder: Path, **changes: Any) -> GradientProbe:
    settings = {
        "objective": setup.objective,
        "every_steps": 2,
        "num_rollouts": 8,
        "path": folder / PROBE_FILE,
    } | changes
    return GradientProbe(
        lambda items: setup.loss(build_batch(items)).loss_sum, setup.student_model.parameters(), **settings
    )


def test_it_is_what_gradients_taken_one_by_one_say(trained: tuple[Setup, list[StepRecord]], tmp_path: Path) -> None:
    setup, records = trained
    found = make_probe(setup, tmp_path).measure(records[0])[KEY]
    gradients = []
    for item in spread(records[0].scored)[:8]:
        setup.student_model.zero_grad(set_to_none=True)
        setup.loss(build_batch([item])).loss_sum.backward()
        parts = [p.grad.double().flatten() for p in setup.student_model.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts).numpy())
    setup.student_model.zero_grad(set_to_none=True)
    expected = np.linalg.norm(np.mean(gradients, axis=0)) / np.mean([np.linalg.norm(g) for g in gradients])
    assert 0 < expected < 1
    assert found == pytest.approx(expected, rel=1e-5)


def test_it_is_measured_at_first_and_every_so_many_steps_on_the_same_rollouts(
    trained: tuple[Setup, list[StepRecord]], tmp_path: Path
) -> None:
    setup, records = trained
    probe = make_probe(setup, tmp_path)
    found = [probe.measure(record) for record in records]
    assert [bool(metrics) for metrics in found] == [True, True, False, True]
    # The weights are the last ones throughout, and the probe is the first step's.
    assert found[0] == found[1] == found[3]
    resumed = make_probe(setup, tmp_path)
    assert resumed.measure(records[2]) == {}
    assert resumed.measure(records[3]) == found[0]
    assert make_probe(setup, tmp_path, every_steps=0).measure(records[0]) == {}


def test_too_few_rollouts_make_no_probe(trained: tuple[Setup, list[StepRecord]], tmp_path: Path) -> None:
    setup, records = trained
    few = dataclasses.replace(records[0], scored=records[0].scored[:7])
    assert make_probe(setup, tmp_path).measure(few) == {}
    assert not (tmp_path / PROBE_FILE).exists()


def test_measuring_leaves_the_weights_and_their_gradients_alone(
    trained: tuple[Setup, list[StepRecord]], tmp_path: Path
) -> None:
    setup, records = trained
    before = setup.parameters()
    make_probe(setup, tmp_path).measure(records[0])
    assert torch.equal(before, setup.parameters())
    assert all(parameter.grad is None for parameter in setup.student_model.parameters())


def test_a_device_without_room_goes_on_without_the_metric(
    trained: tuple[Setup, list[StepRecord]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def loss(items: Any) -> torch.Tensor:
        calls.append(items)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return trained[0].loss(build_batch(items)).loss_sum

    parameters = trained[0].student_model.parameters()
    settings = {"every_steps": 1, "num_rollouts": 8, "path": tmp_path / PROBE_FILE}
    probe = GradientProbe(loss, parameters, objective=trained[0].objective, **settings)
    assert [probe.measure(record) for record in trained[1]] == [{}] * 4
    assert len(calls) == 3 and len(caplog.records) == 1
    assert "no memory for two more copies of the gradient" in caplog.text


def in_group(name: str, group: int) -> ScoredRollout:
    item = scored(name, [5], [8, 9])
    return dataclasses.replace(item, rollout=dataclasses.replace(item.rollout, group=group))


def test_every_prompt_has_one_rollout_before_any_has_two() -> None:
    items = [in_group(f"{group}{turn}", group) for group in range(3) for turn in "abc"]
    names = [item.rollout.rollout_id for item in spread(items)]
    assert names == ["0a", "1a", "2a", "0b", "1b", "2b", "0c", "1c", "2c"]


def test_a_probe_comes_back_from_disk_as_it_was(trained: tuple[Setup, list[StepRecord]], tmp_path: Path) -> None:
    items = [*trained[1][0].scored, in_group("none", 3)]
    write_probe(tmp_path / PROBE_FILE, StoredProbe(objective="ab12", step=3, rollouts=items))
    probe = read_probe(tmp_path / PROBE_FILE)
    assert (probe.objective, probe.step) == ("ab12", 3)
    for item, again in zip(items, probe.rollouts, strict=True):
        for part in ("rollout", "scores"):
            for field in dataclasses.fields(getattr(item, part)):
                value, found = (getattr(getattr(x, part), field.name) for x in (item, again))
                assert type(value) is type(found), field.name
                np.testing.assert_array_equal(value, found)


def test_only_a_probe_of_a_later_step_is_removed_after_a_step(
    trained: tuple[Setup, list[StepRecord]], tmp_path: Path
) -> None:
    path = tmp_path / PROBE_FILE
    remove_probe(path, after=0)
    make_probe(trained[0], tmp_path).measure(trained[1][2])
    assert read_probe(path).step == 3
    remove_probe(path, after=3)
    assert path.exists()
    remove_probe(path, after=2)
    assert not path.exists()
    path.write_bytes(b"broken")
    remove_probe(path, after=2)
    assert path.exists(), "whoever is to use it says so"
    remove_probe(path)
    assert not path.exists()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"probe\.npz: cannot be removed \(Is a directory\); remove it by hand"):
        remove_probe(path)


def test_a_probe_of_an_earlier_version_counts_as_the_first_steps(
    trained: tuple[Setup, list[StepRecord]], tmp_path: Path
) -> None:
    path = tmp_path / PROBE_FILE
    make_probe(trained[0], tmp_path).measure(trained[1][2])
    with np.load(path) as archive:
        arrays = {name: value for name, value in archive.items() if name != "step"}
    np.savez(path, **arrays)
    assert read_probe(path).step == 1
    remove_probe(path, after=1)
    assert len(read_probe(path).rollouts) == 8


def test_a_broken_probe_is_one_line(tmp_path: Path) -> None:
    (tmp_path / PROBE_FILE).write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(CheckpointError, match=r"probe\.npz: is no probe of this version .* begins anew$"):
        read_probe(tmp_path / PROBE_FILE)


def test_a_probe_that_cannot_be_used_is_replaced_with_a_warning(
    trained: tuple[Setup, list[StepRecord]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    setup, records = trained
    expected = make_probe(setup, tmp_path).measure(records[0])
    (tmp_path / PROBE_FILE).write_bytes(b"broken")
    # Step 1 is no multiple of two: a new probe is measured at once.
    assert make_probe(setup, tmp_path).measure(records[0]) == expected
    assert len(caplog.records) == 1 and "is no probe of this version" in caplog.text
    assert make_probe(setup, tmp_path).measure(records[0]) == {}, "the new one is read again"


def test_another_objective_takes_a_probe_of_its_own(
    trained: tuple[Setup, list[StepRecord]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The stored rollouts have no advantages, without which this objective has no loss."""
    make_probe(trained[0], tmp_path).measure(trained[1][0])
    graded = Setup(
        objective=ObjectiveConfig(score_top_k=6, outcome={"weight": 1.0}),
        prompts_per_step=4,
        reward=lambda rollout, prompt: float(rollout.response_token_ids[-1]),
    )
    record = graded.loop().run_step()
    assert KEY in make_probe(graded, tmp_path).measure(record)
    assert "was taken for another objective" in caplog.text
    caplog.clear()
    assert make_probe(graded, tmp_path).measure(record) == {} and not caplog.records


def test_where_only_outcomes_teach_the_probe_is_of_rollouts_that_have_one(tmp_path: Path) -> None:
    grpo = Setup(
        objective=ObjectiveConfig(kind="grpo", score_top_k=6),
        prompts_per_step=5,
        rollouts_per_prompt=4,
        reward=lambda rollout, prompt: float(rollout.response_token_ids[-1]),
    )
    record = grpo.loop().run_step()

    def with_a_signal(groups: set[int]) -> StepRecord:
        items = [
            item if item.rollout.group in groups else dataclasses.replace(item, advantage=0.0) for item in record.scored
        ]
        return dataclasses.replace(record, scored=items)

    probe = make_probe(grpo, tmp_path)
    assert probe.measure(with_a_signal({1})) == {} and not (tmp_path / PROBE_FILE).exists()
    assert probe.measure(with_a_signal(set(range(1, 5))))[KEY] > 0
    chosen = read_probe(tmp_path / PROBE_FILE).rollouts
    assert len(chosen) == 8 and all(item.advantage for item in chosen)


def test_a_measurement_that_fails_does_not_end_the_run(
    trained: tuple[Setup, list[StepRecord]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def loss(items: Any) -> torch.Tensor:
        raise InternalError("no advantages")

    settings = {"every_steps": 1, "num_rollouts": 8, "path": tmp_path / PROBE_FILE}
    parameters = trained[0].student_model.parameters()
    probe = GradientProbe(loss, parameters, objective=trained[0].objective, **settings)
    assert [probe.measure(record) for record in trained[1]] == [{}] * 4
    assert [record.getMessage() for record in caplog.records] == [
        "distill/gradient_coherence is not measured from here on: no advantages"
    ]
