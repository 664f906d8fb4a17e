"""Real vLLM processes over small models, and the float64 reference of what they sample.

Runs in .venv-vllm (`make test-vllm`); elsewhere it is skipped, or fails with OPD_REQUIRE_VLLM=1.
"""

import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from opd.types import Rollout
from services.trainer.rollout.base import RolloutRequest, derive_seed
from services.trainer.rollout.vllm_engine import VllmEngine, asked_width
from services.trainer.rollout.vllm_files import VersionFolder
from services.trainer.rollout.vllm_process import VllmProcess
from services.trainer.rollout.vllm_sampler import SamplerOptions
from services.trainer.rollout.vllm_weights import DriftProbe, FileSender, PublishedWeights
from tests.contract.engines.conftest import need_vllm
from tests.unit.teacher_server.tiny_teachers import tiny_config

ROOT = Path(__file__).parents[3]
MODELS = ROOT / "testbed/models"
EOS, K, MAX_CONTEXT = 2, 6, 120
NUM_IDS, NUM_HOSTILE_IDS = 512, 90
TOLERANCE = 1e-3
START_S = 240.0


@dataclass(frozen=True, kw_only=True)
class Stand:
    """An engine's process, the model whose weights it was given, and the way for new ones."""

    process: VllmProcess
    folder: VersionFolder
    model: Any
    engine: VllmEngine
    num_defined_ids: int

    @property
    def weights(self) -> PublishedWeights:
        return self.weights_of(self.model)

    def weights_of(self, model: Any, *, max_drift: float = 1e-3) -> PublishedWeights:
        """A publisher that sends this model's weights and compares with the trainer's."""
        probe = DriftProbe(
            self.engine,
            self.model,
            prompt_token_ids=np.arange(5, 15, dtype=np.int32),
            num_defined_ids=self.num_defined_ids,
            temperature=1.0,
        )
        sender = FileSender(self.process, self.folder, model, torch.float32)
        return PublishedWeights(self.engine, sender, probe, max_drift=max_drift)

    def evaluation_engine(self) -> VllmEngine:
        return VllmEngine(self.process, num_defined_ids=self.num_defined_ids, max_context=MAX_CONTEXT, score_top_k=None)


def _python(folder: Path) -> Path | None:
    """With VLLM_USE_V2_MODEL_RUNNER=1 a Python whose Triton passes for one with a CPU; see the engines' conftest."""
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1" or torch.cuda.is_available():
        return None
    wrapper = folder / "python"
    wrapper.write_text(
        f"#!{sys.executable}\n"
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.contract.engines.conftest import believe_in_triton\n"
        "believe_in_triton()\n"
        "sys.argv = sys.argv[2:]\n"
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n",
        encoding="utf-8",
    )
    wrapper.chmod(0o755)
    return wrapper


def open_stand(opened: ExitStack, folder: Path, model: Any, *, num_defined_ids: int) -> Stand:
    versions = VersionFolder(None)
    opened.callback(versions.close)
    process = VllmProcess(python=_python(folder), environment={}, log=folder / "engine.log", patience_s=START_S)
    opened.callback(process.close)
    options = SamplerOptions(
        folder=str(versions.write(model, -1, torch.float32)),
        dtype="float32",
        num_defined_ids=num_defined_ids,
        eos_token_ids=(EOS,),
        max_context=MAX_CONTEXT,
        max_slots=16,
        max_width=asked_width(K, num_defined_ids),
        gpu_memory_utilization=0.4,
        kv_cache_bytes=128 << 20,
        max_num_batched_tokens=64,
        enforce_eager=True,
        takes_nccl=False,
    )
    max_context = process.start(asdict(options), versions.path)
    engine = VllmEngine(process, num_defined_ids=num_defined_ids, max_context=max_context, score_top_k=K)
    return Stand(process=process, folder=versions, model=model, engine=engine, num_defined_ids=num_defined_ids)


@pytest.fixture(scope="session")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """Over student-base; whoever changes its weights puts them back."""
    need_vllm()
    with ExitStack() as opened:
        yield open_stand(
            opened, tmp_path_factory.mktemp("engine"), bundled_model("student-base"), num_defined_ids=NUM_IDS
        )


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    need_vllm()
    with ExitStack() as opened:
        yield open_stand(opened, tmp_path_factory.mktemp("engine"), hostile_model(), num_defined_ids=NUM_HOSTILE_IDS)


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """In the environment of every process that the test starts."""
    need_vllm()
    value = uuid.uuid4().hex
    monkeypatch.setenv("MARKED_BY_TEST", value)
    return value


def bundled_model(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()


def hostile_model() -> Any:
    """Untied, with rows of the head that have no token and would take most of the probability; and many equal ids."""
    torch.manual_seed(0)
    # Attention kernels for CPU begin at 32 values a head.
    model = Qwen3ForCausalLM(tiny_config(head_dim=32, num_attention_heads=2, num_key_value_heads=1)).eval()
    with torch.no_grad():
        model.lm_head.weight[NUM_HOSTILE_IDS:] *= 30
        model.lm_head.weight[40:44] = model.lm_head.weight[40]
    return model


def requests(count: int, *, seed: int = 0, num_ids: int = 90, length: int = 10) -> list[RolloutRequest]:
    generator = np.random.default_rng(seed)
    return [
        RolloutRequest(
            rollout_id=f"run.0.{index}",
            group=index // 2,
            prompt_token_ids=generator.integers(3, num_ids, size=1 + index % length).astype(np.int32),
            seed=derive_seed(seed, index),
        )
        for index in range(count)
    ]


def reference(model: Any, rollout: Rollout, num_defined_ids: int, temperature: float = 1.0) -> np.ndarray:
    """[R, V] float64 log-probs by a plain forward pass in float64."""
    ids = np.concatenate([rollout.prompt_token_ids, rollout.response_token_ids]).astype(np.int64)
    exact = type(model)(model.config).eval().double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = exact(torch.from_numpy(ids)[None]).logits[0, rollout.prompt_token_ids.size - 1 : -1]
    return (logits[:, :num_defined_ids] / temperature).log_softmax(dim=-1).numpy()


def assert_exact(stand: Stand, model: Any, rollout: Rollout, temperature: float = 1.0) -> None:
    """Everything that is recorded, against the reference."""
    expected = reference(model, rollout, stand.num_defined_ids, temperature)
    rows = np.arange(rollout.response_token_ids.size)
    sampled = expected[rows, rollout.response_token_ids]
    np.testing.assert_allclose(rollout.sampled_logprobs, sampled, atol=TOLERANCE)
    np.testing.assert_allclose(rollout.rollout_logprobs, sampled, atol=TOLERANCE)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :K]
    np.testing.assert_allclose(rollout.topk_logprobs, np.take_along_axis(expected, order, axis=1), atol=TOLERANCE)
    chosen = np.take_along_axis(expected, rollout.topk_token_ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(chosen, rollout.topk_logprobs, atol=TOLERANCE)
    assert np.isnan(rollout.entropy).all()
