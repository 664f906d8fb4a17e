"""Out of memory, for real on this machine's CPU: one line that names settings, whatever the run was doing."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.errors import ConfigError, RolloutEngineError
from services.trainer.evaluation import command
from services.trainer.evaluator import Evaluator
from services.trainer.loop import StepRecord
from services.trainer.memory import FOR_STEP, is_out_of_memory, memory_errors
from services.trainer.rollout.vllm_weights import PublishedWeights
from services.trainer.run import FAILED, REFUSED, run_training
from services.trainer.step_metrics import StepMetrics
from services.trainer.student import Student
from tests.unit.trainer.tiny_training import Setup, tiny_model, tiny_tokenizer


def ask_for_too_much(*_: object, **__: object) -> torch.Tensor:
    return torch.empty(1 << 55, dtype=torch.uint8)


@pytest.mark.parametrize("ask", [ask_for_too_much, lambda: np.empty(1 << 55, np.uint8), lambda: bytearray(1 << 55)])
def test_a_cpu_without_room_is_recognised(ask: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        ask()
    assert is_out_of_memory(caught.value)
    with (
        pytest.raises(ConfigError, match=r"^the device is out of memory \(.*\); lower student\.max_micro_batch_tokens"),
        memory_errors(FOR_STEP),
    ):
        ask()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RolloutEngineError("vLLM failed: CUDA error: out of memory"), False),
    ],
)
def test_what_is_no_lack_of_memory_passes(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    with pytest.raises(ConfigError if expected else type(error)), memory_errors(FOR_STEP):
        raise error


def train(folder: Path) -> int:
    tiny_model(1).save_pretrained(folder / "student")
    tiny_tokenizer().save_pretrained(folder / "student")
    rows = [{"prompt": f"w{2 + index}"} for index in range(8)]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    problem = {"prompt": [{"role": "user", "content": "w3"}], "reward_model": {"ground_truth": "4"}}
    (folder / "problems.jsonl").write_text(f"{json.dumps(problem)}\n", encoding="utf-8")
    overrides = [
        f"student.model={folder}/student", f'data.files=["{folder}/prompts.jsonl"]', f"run_dir={folder}/run", "steps=1",
        "rollout.prompts_per_step=2", "rollout.max_prompt_tokens=20", "rollout.max_response_tokens=8",
        "objective.score_top_k=6", "teacher.kind=self", "student.device=cpu", "http.enabled=false",
        f'evaluation.files=["{folder}/problems.jsonl"]', "evaluation.template=boxed",
    ]  # fmt: skip
    return run_training(None, overrides, resume=False)


@pytest.mark.parametrize(
    ("owner", "name", "code", "line"),
    [
        (AutoModelForCausalLM, "from_pretrained", REFUSED, "use a smaller student.model, or another student.device"),
        (Evaluator, "evaluate", FAILED, "lower evaluation.max_response_tokens, evaluation.num_samples or rollout.max"),
        (Student, "_response_hidden", FAILED, "lower student.max_micro_batch_tokens or student.row_chunk"),
        (StepMetrics, "summarize", FAILED, "lower student.max_micro_batch_tokens or student.row_chunk"),
    ],
)
def test_the_last_line_of_a_run_names_the_settings_of_what_it_did(
    owner: object,
    name: str,
    code: int,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as changed:
        changed.setattr(owner, name, ask_for_too_much)
        if name != "evaluate":
            changed.setattr(Evaluator, "evaluate", lambda self, step: {})
        assert train(tmp_path) == code
    said = capfd.readouterr().err
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert "the device is out of memory (" in last and "allocate memory" in last and line in last
    if code == FAILED:
        events = [json.loads(text) for text in (tmp_path / "run/events.jsonl").read_text().splitlines()]
        assert {"code": ConfigError.code}.items() <= next(e for e in events if e["event"] == "error").items()


def test_an_evaluation_by_command_names_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "open_problems", lambda *_, **__: {"set": []})
    monkeypatch.setattr(command, "open_model", ask_for_too_much)
    with pytest.raises(ConfigError, match=r"^the device is out of memory \(.*\); lower --max-slots"):
        command.evaluate_command(["model"], ["set"])


class Unmoved:
    """Sends, and finds no drift, as long as there is room."""

    def send(self, version: int) -> None:
        if version:
            ask_for_too_much()

    def measure(self, version: int) -> float:
        return 0.0


def test_publishing_without_room_ends_the_run_after_the_step_is_on_record() -> None:
    setup = Setup(num_steps=2)
    loop, records = setup.loop(), list[StepRecord]()
    loop._weights = PublishedWeights(setup.engine, Unmoved(), Unmoved(), max_drift=1.0)
    with pytest.raises(ConfigError, match=r"^step 1: the device is out of memory .*rollout\.vllm\.kv_cache_bytes"):
        loop.run(records.append)
    assert [record.step for record in records] == [1]
