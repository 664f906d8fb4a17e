"""The engines under one contract, and the models they are held to.

The vLLM half runs in .venv-vllm (`make test-vllm`). Elsewhere it is skipped with that reason; with OPD_REQUIRE_VLLM=1,
as `make test-vllm` sets it, a missing vLLM is a failure. A second run has TRITON_INTERPRET=1 and
VLLM_USE_V2_MODEL_RUNNER=1: that is the runner vLLM uses on CUDA, with its Triton kernels interpreted, so candidate ids
are asked for and answered without a GPU.
"""

import importlib.util
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from services.teacher_server.config import TeacherConfig
from services.teacher_server.engines.base import ScoringEngine
from services.teacher_server.engines.transformers_engine import EngineLimits, load_engine
from services.teacher_server.engines.vllm_engine import load_vllm_engine
from tests.unit.teacher_server.tiny_teachers import save_tokenizer, tiny_config

STUDENT_BASE = Path(__file__).parents[3] / "testbed/models/student-base"
# Forward passes in pieces, so that sequences longer than one are covered.
MAX_BATCHED_TOKENS = 256
NUM_TIED_IDS = 70
NAN_TOKEN = 80

LoadEngine = Callable[[Path], ScoringEngine]
# Importing vLLM warns of itself, of torch and of this machine.
VLLM = pytest.param("vllm", marks=[pytest.mark.filterwarnings("default"), pytest.mark.timeout(300)])


def believe_in_triton() -> None:
    """Before vLLM is imported: it wants a Triton with a backend for the CPU; the interpreter needs none."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "must be set before anything imports triton"
    from triton.backends import backends

    backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True), compiler=None)


if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" and not torch.cuda.is_available():
    believe_in_triton()


def need_vllm() -> None:
    if importlib.util.find_spec("vllm") is not None:
        return
    message = "vllm is not installed in this Python; `make test-vllm` runs this in .venv-vllm"
    if os.environ.get("OPD_REQUIRE_VLLM") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="module", params=["transformers", VLLM])
def engine_name(request: pytest.FixtureRequest) -> str:
    if request.param == "vllm":
        need_vllm()
    return str(request.param)


@pytest.fixture(scope="module")
def engine(engine_name: str) -> Iterator[ScoringEngine]:
    """The engine over student-base in fp32."""
    loaded = load(engine_name, STUDENT_BASE)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def hostile_engine(engine_name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScoringEngine, Path]]:
    folder = save_hostile_teacher(tmp_path_factory.mktemp("models") / "hostile")
    loaded = load(engine_name, folder)
    yield loaded, folder
    loaded.close()


def load(name: str, folder: Path) -> ScoringEngine:
    if name == "vllm":
        settings = {"enforce_eager": True, "max_num_batched_tokens": MAX_BATCHED_TOKENS, "kv_cache_bytes": 256 << 20}
        return load_vllm_engine(
            TeacherConfig(model=str(folder), teacher="tiny", engine="vllm", dtype="float32", vllm=settings)
        )
    return load_engine(
        str(folder), teacher="tiny", device="cpu", dtype="float32", max_context=0, limits=EngineLimits(row_chunk=32)
    )


def save_hostile_teacher(folder: Path) -> Path:
    """Rows without a token that would take most of the probability; many ids with equal logits; one NaN embedding."""
    torch.manual_seed(0)
    # Attention kernels for CPU begin at 32 values a head.
    model = Qwen3ForCausalLM(tiny_config(head_dim=32, num_attention_heads=2, num_key_value_heads=1))
    num_defined_ids = 90
    with torch.no_grad():
        head_VH = model.lm_head.weight
        head_VH[num_defined_ids:] *= 30
        head_VH[:NUM_TIED_IDS] = 0
        model.model.embed_tokens.weight[NAN_TOKEN] = torch.nan
    model.save_pretrained(folder)
    save_tokenizer(folder, num_defined_ids)
    return folder
