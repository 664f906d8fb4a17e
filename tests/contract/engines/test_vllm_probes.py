"""The probes at load: a vLLM that normalises over too much is not served."""

from pathlib import Path

import pytest

from opd.errors import ConfigError
from services.teacher_server.engines import vllm_model
from tests.contract.engines.conftest import VLLM, load, need_vllm, save_hostile_teacher


@pytest.mark.parametrize("name", [VLLM])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("_cut_vocabulary", r"vLLM does not normalise over the 90 defined ids"),
        ("_cut_logits", r"6 rows of its output head have no token, and vLLM computes its logits in a way"),
    ],
)
def test_a_normaliser_with_undefined_rows_is_refused(
    name: str, function: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_vllm()
    monkeypatch.setattr(vllm_model, function, lambda *_, **__: None)
    with pytest.raises(ConfigError, match=message):
        load(name, save_hostile_teacher(tmp_path / "hostile"))
