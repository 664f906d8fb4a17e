"""Training on the whole vocabulary: the step's gradient by brute force, a falling divergence, and what is refused."""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from opd.errors import ConfigError, InternalError, NonFiniteError, UnsupportedError
from opd.ops import OutputHead
from opd.types import Capability, OutputHeadFile, ScoreReply, ScoreRequest, TeacherInfo
from services.trainer.batch import ScoredRollout, build_batch
from services.trainer.config import OptimSettings
from services.trainer.loop import StepRecord
from services.trainer.loss import DistillLoss
from services.trainer.objectives.config import ObjectiveConfig
from services.trainer.objectives.dispatch import build_objective
from services.trainer.student import output_head
from services.trainer.teacher_head import TeacherHead, load_output_head
from tests.unit.trainer.tiny_training import NUM_IDS, TEACHER_INFO, ExactClient, Setup, teacher_client, tiny_model

INFO = dataclasses.replace(TEACHER_INFO, hidden_size=48, output_head_hash="a" * 64)


def teacher_model() -> Any:
    """Of another hidden size than the student, and with rows without a token."""
    return tiny_model(2, vocab=NUM_IDS + 5, hidden_size=48)


@dataclass
class HiddenClient(ExactClient):
    """Adds the teacher's hidden states where they are asked for."""

    current_info: TeacherInfo = INFO

    def submit(self, request: ScoreRequest) -> Any:
        future = super().submit(request)
        if not request.wants_hidden_states or future.exception() is not None:
            return future
        ids = np.concatenate([request.prompt_token_ids, request.response_token_ids]).astype(np.int64)
        with torch.no_grad():
            hidden_LH = self.model.base_model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0]
        reply: ScoreReply = future.result()
        states = hidden_LH[request.prompt_token_ids.size - 1 : -1].numpy()
        changed: Any = type(future)()
        scores = dataclasses.replace(reply.scores, hidden_states=states)
        changed.set_result(dataclasses.replace(reply, scores=scores))
        return changed


def whole_vocabulary(**changes: Any) -> Setup:
    objective = ObjectiveConfig(kind="full_vocabulary", score_top_k=6, **changes.pop("objective", {}))
    model = teacher_model()
    setup = Setup(objective=objective, teacher_model=model, client=HiddenClient(model=model), **changes)
    setup.loss = DistillLoss(setup.student, build_objective(objective), objective, lambda: output_head(model))
    return setup


def run(setup: Setup) -> list[StepRecord]:
    records: list[StepRecord] = []
    setup.loop().run(records.append)
    return records


def brute_loss(student: Any, teacher: Any, scored: list[ScoredRollout], temperature: float) -> torch.Tensor:
    """Sum over positions of eq 4 in float64, one rollout at a time, whole logits."""
    total = torch.zeros((), dtype=torch.float64)
    for item in scored:
        ids = np.concatenate([item.rollout.prompt_token_ids, item.rollout.response_token_ids]).astype(np.int64)
        rows = slice(item.rollout.prompt_token_ids.size - 1, -1)
        found = [
            (model(input_ids=torch.from_numpy(ids)[None]).logits[0, rows, :NUM_IDS] / scale).log_softmax(-1)
            for model, scale in ((student, 1.0), (teacher, temperature))
        ]
        total = total + (found[0].exp() * (found[0] - found[1].detach())).sum()
    return total


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_loss_and_gradient_are_those_of_whole_logits_in_float64(temperature: float) -> None:
    setup = whole_vocabulary(objective={"teacher_temperature": temperature}, num_steps=1)
    student = copy.deepcopy(setup.student_model).double()
    (record,) = run(setup)
    setup.student_model.load_state_dict({name: value.float() for name, value in student.state_dict().items()})
    setup.optimizer.zero_grad()
    output = setup.loss(build_batch(list(record.scored)))
    output.loss_sum.backward()
    expected = brute_loss(student, copy.deepcopy(setup.teacher_model).double(), list(record.scored), temperature)
    expected.backward()
    assert output.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, exact in zip(setup.student_model.parameters(), student.parameters(), strict=True):
        assert (found.grad - exact.grad).norm() <= 1e-4 * exact.grad.norm() + 1e-6


def test_the_divergence_falls() -> None:
    records = run(whole_vocabulary(num_steps=15, prompts_per_step=8, max_slots=16, optim=OptimSettings(lr=1e-2)))
    losses = [record.losses["loss/objective"].value for record in records]
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])


def test_a_step_does_not_depend_on_its_split_and_staleness_is_weighted() -> None:
    found = []
    for max_micro_batch_tokens in (1, 10_000):
        setup = whole_vocabulary(
            objective={"staleness_cap": 2.0}, num_steps=1, max_micro_batch_tokens=max_micro_batch_tokens
        )
        (record,) = run(setup)
        # Strictly on-policy, so every weight is 1.
        assert record.losses["loss/staleness_weight"].value == pytest.approx(1.0, abs=1e-4)
        found.append(setup.parameters())
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


def test_the_same_reply_still_has_what_the_diagnostics_read() -> None:
    (record,) = run(whole_vocabulary(num_steps=1))
    scores = record.scored[0].scores
    assert scores.topk_logprobs is not None and scores.candidate_logprobs is not None and scores.entropy is not None


def test_a_teacher_without_hidden_states_is_refused_at_the_handshake() -> None:
    info = dataclasses.replace(INFO, capabilities=frozenset(Capability) - {Capability.HIDDEN_STATES})
    client = teacher_client(HiddenClient(model=None, current_info=info), needs=frozenset({Capability.HIDDEN_STATES}))
    with pytest.raises(UnsupportedError, match="cannot supply hidden_states"):
        client.shake_hands(wait_s=0)


@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        (None, InternalError, "teacher hidden_states are nothing instead of"),
        (np.zeros((1, 48), np.float32), InternalError, r"hidden_states are \(1, 48\) instead of"),
        (np.full((12, 48), np.nan, np.float32), NonFiniteError, "teacher hidden_states are not finite"),
    ],
)
def test_states_that_do_not_fit_are_refused(states: Any, error: type[Exception], message: str) -> None:
    setup = whole_vocabulary(num_steps=1)
    rollout = run(setup)[0].scored[0].rollout
    reply = setup.client.submit(setup.client.requests[0]).result()
    # One rollout's reply for all: what is compared is the shape.
    request = dataclasses.replace(setup.client.requests[0], response_token_ids=rollout.response_token_ids,
                                  candidate_token_ids=rollout.topk_token_ids)  # fmt: skip
    reply = setup.client.submit(request).result()
    if states is not None and states.shape[0] == 12:
        states = states[:1].repeat(rollout.response_token_ids.size, axis=0)
    broken = dataclasses.replace(reply, scores=dataclasses.replace(reply.scores, hidden_states=states))
    with pytest.raises(error, match=message):
        setup.teacher.accept(rollout, broken)


def test_without_a_head_the_loss_says_so() -> None:
    setup = whole_vocabulary(num_steps=1)
    (record,) = run(setup)
    loss = DistillLoss(setup.student, build_objective(setup.objective), setup.objective)
    with pytest.raises(InternalError, match="needs the teacher's hidden states and head"):
        loss(build_batch(list(record.scored)))


@dataclass
class Heads:
    """Head files by hash; counts how often one was asked for."""

    folder: Path
    current: str
    asked: int = 0

    def output_head(self, folder: Path) -> OutputHeadFile:
        self.asked += 1
        path = self.folder / f"{self.current}.safetensors"
        save_file({"weight": torch.full((3, 2), float(len(self.current)), dtype=torch.bfloat16)}, path)
        return OutputHeadFile(path=path, sha256=self.current, num_defined_ids=3, logit_scale=0.5, logit_softcap=9.0)


def test_a_head_is_loaded_once_and_again_when_the_pool_moved(tmp_path: Path) -> None:
    heads, info = Heads(tmp_path, "a" * 64), [INFO]
    head = TeacherHead(heads, lambda: info[0], folder=tmp_path, device="cpu")
    first: OutputHead = head()
    assert head() is first and heads.asked == 1
    assert (first.weight_VH.dtype, first.bias_V, first.logit_scale, first.soft_cap) == (torch.bfloat16, None, 0.5, 9.0)
    heads.current, info[0] = "b" * 64, dataclasses.replace(INFO, output_head_hash="b" * 64)
    assert head() is not first and heads.asked == 2
    heads.current, info[0] = "c" * 64, dataclasses.replace(INFO, output_head_hash="d" * 64)
    with pytest.raises(ConfigError, match="its head changed from dddddddddddd to cccccccccccc within a step"):
        head()


def test_a_file_that_is_no_head_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    file = OutputHeadFile(path=path, sha256="a" * 64, num_defined_ids=3)
    for content in (None, b"not a head"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"output head .*head\.safetensors: cannot be read .*remove it"):
            load_output_head(file)
