"""New weights in vLLM: they arrive whole or not at all, and other weights than the trainer's are not sampled from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from opd.errors import RolloutEngineError
from opd.types import Rollout
from services.trainer.rollout.base import SamplingParams
from tests.contract.rollouts.conftest import (
    Stand,
    assert_exact,
    bundled_model,
    reference,
    requests,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SAMPLING = SamplingParams(max_response_tokens=30)


def sampled(stand: Stand) -> list[Rollout]:
    return stand.engine.sample(requests(6), SAMPLING)


def change(stand: Stand, scale: float) -> None:
    """Every weight of the trainer's model, as an optimizer would."""
    generator = torch.Generator().manual_seed(int(scale * 1000))
    with torch.no_grad():
        for value in stand.model.parameters():
            value.add_(scale * value.std() * torch.randn(value.shape, generator=generator))


@pytest.mark.parametrize("name", ["stand", "hostile"])
def test_a_new_version_changes_what_is_sampled(name: str, request: pytest.FixtureRequest) -> None:
    """Tied and untied heads; the prompts are those of the version before, whose keys and values are cached."""
    stand: Stand = request.getfixturevalue(name)
    weights, original = stand.weights, {key: value.clone() for key, value in stand.model.state_dict().items()}
    for version, scale in ((1, 0.0), (2, 0.1), (3, 0.05)):
        before = {key: value.clone() for key, value in stand.model.state_dict().items()}
        change(stand, scale)
        weights.publish(version)
        assert weights.metrics()["rollout/engine_drift"] < 1e-4
        rollouts = sampled(stand)
        assert {rollout.policy_version for rollout in rollouts} == {version}
        for rollout in rollouts:
            assert_exact(stand, stand.model, rollout)
        if scale:
            after = {key: value.clone() for key, value in stand.model.state_dict().items()}
            stand.model.load_state_dict(before)
            rows = np.arange(rollouts[0].response_token_ids.size)
            old = reference(stand.model, rollouts[0], stand.num_defined_ids)[rows, rollouts[0].response_token_ids]
            stand.model.load_state_dict(after)
            assert np.abs(old - rollouts[0].sampled_logprobs).mean() > 0.01
    stand.model.load_state_dict(original)
    weights.publish(4)
    assert list(stand.folder.path.glob("version-[1-9]*")) == []


def cut(folder: Path) -> None:
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def cut_and_marked(folder: Path) -> None:
    """As a disk that lies about what it wrote."""
    cut(folder)
    mark = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
    mark["sizes"] = {name: (folder / name).stat().st_size for name in mark["sizes"]}
    (folder / "complete.json").write_text(json.dumps(mark), encoding="utf-8")


def unmarked(folder: Path) -> None:
    (folder / "complete.json").unlink()


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, r"has \d+ bytes of \d+; it is not loaded"),
        (cut_and_marked, r"is not whole \(.*it is not loaded"),
        (unmarked, r"is not marked complete"),
        (gone, r"is not marked complete"),
    ],
)
def test_half_a_version_is_never_loaded(stand: Stand, spoil: Callable[[Path], None], message: str) -> None:
    before = sampled(stand)
    other = bundled_model("teacher-post")
    folder = stand.folder.write(other, 77, torch.float32)
    spoil(folder)
    with pytest.raises(RolloutEngineError, match=message):
        stand.process.ask("load", {"folder": str(folder), "version": 77})
    stand.folder.forget(folder)
    after = sampled(stand)
    assert [rollout.response_token_ids.tolist() for rollout in after] == [
        rollout.response_token_ids.tolist() for rollout in before
    ]
    assert {rollout.policy_version for rollout in after} == {rollout.policy_version for rollout in before}


@pytest.mark.parametrize("what", ["version", "tensors"])
def test_another_version_or_another_model_is_not_loaded(stand: Stand, what: str) -> None:
    model = bundled_model("teacher-big") if what == "tensors" else bundled_model("teacher-post")
    folder = stand.folder.write(model, 78, torch.float32)
    version = 79 if what == "version" else 78
    message = r"is version 78, not 79" if what == "version" else r"is not as the model has it"
    with pytest.raises(RolloutEngineError, match=message):
        stand.process.ask("load", {"folder": str(folder), "version": version})
    stand.folder.forget(folder)
    stand.weights.publish(80)


def test_weights_that_are_not_the_trainers_are_refused(stand: Stand) -> None:
    with pytest.raises(
        RolloutEngineError, match=r"^rollout\.max_drift=0\.001: .* version 90 .* differ by \d"
    ) as caught:
        stand.weights_of(bundled_model("teacher-post")).publish(90)
    assert "\n" not in caught.value.message
    # The bound is what refuses them.
    weights = stand.weights_of(bundled_model("teacher-post"), max_drift=10.0)
    weights.publish(91)
    assert 0.01 < weights.drift < 10
    stand.weights.publish(92)
    assert_exact(stand, stand.model, sampled(stand)[0])


def test_weights_of_nan_are_refused(stand: Stand) -> None:
    broken = bundled_model("student-base")
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(Exception, match=r"NaN or infinite|rollout\.max_drift"):
        stand.weights_of(broken).publish(95)
    stand.weights.publish(96)
    assert_exact(stand, stand.model, sampled(stand)[0])
