"""What a configuration may ask of the engine that samples."""

import importlib.util
import sys
from pathlib import Path

import pytest

from opd.errors import ConfigError
from opd.settings import load_settings
from services.trainer.config import TrainSettings
from services.trainer.rollout.settings import EngineKind

ENOUGH = ["student.model=s", 'data.files=["p.jsonl"]']
VLLM = ["rollout.engine=vllm", f"rollout.vllm.python={sys.executable}"]


def load(*overrides: str) -> TrainSettings:
    return load_settings(TrainSettings, None, [*ENOUGH, *overrides])


def test_transformers_is_the_default_and_vllm_a_choice() -> None:
    assert load().rollout.engine is EngineKind.TRANSFORMERS
    found = load(*VLLM, "rollout.max_drift=0.2", "rollout.vllm.enforce_eager=true").rollout
    assert (found.engine, found.max_drift, found.vllm.enforce_eager) == (EngineKind.VLLM, 0.2, True)
    assert found.vllm.python == Path(sys.executable)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.vllm.enforce_eager=true"], r"rollout\.vllm\.enforce_eager with rollout\.engine=transformers"),
        (["rollout.max_drift=0.2"], r"rollout\.max_drift with rollout\.engine=transformers would do nothing"),
        ([*VLLM, "rollout.vllm.tensor_parallel_size=2"], r"tensor_parallel_size=2: .* set it to 1"),
        ([*VLLM, "rollout.top_p=0.9"], r"rollout\.top_p=0\.9 with rollout\.engine=vllm"),
        ([*VLLM, "rollout.top_k=20"], r"rollout\.top_k=20 with rollout\.engine=vllm"),
        ([*VLLM, "rollout.threads=2"], r"rollout\.threads=2 with rollout\.engine=vllm would do nothing"),
        (
            [*VLLM, "student.lora.rank=4", "rollout.vllm.transfer=nccl"],
            r"student\.lora with rollout\.vllm\.transfer=nccl: .* set rollout\.vllm\.transfer=files",
        ),
        ([*VLLM, "deterministic=true"], r"deterministic=true with rollout\.engine=vllm"),
        (["rollout.engine=vllm", "rollout.vllm.python=/nowhere"], r"rollout\.vllm\.python=/nowhere: no such file"),
        (["rollout.engine=vlm"], r"rollout\.engine.*vlm"),
    ],
)
def test_what_does_not_go_together_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(*overrides)
    assert "\n" not in caught.value.message


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="this is the Python without vLLM")
def test_a_trainer_without_vllm_says_where_it_is_to_be_had() -> None:
    with pytest.raises(ConfigError, match=r"vLLM is not installed .* scripts/setup_vllm\.sh .* rollout\.vllm\.python="):
        load("rollout.engine=vllm")
