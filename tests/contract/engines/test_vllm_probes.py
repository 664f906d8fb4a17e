"""The probes at load: a vLLM that normalises over too much is not served."""

from pathlib import Path

import pytest

from opd.errors import ConfigError
from services.teacher_server.engines import vllm_model
from tests.contract.engines.conftest import VLLM, load, need_vllm, save_hostile_teacher


@pytest.mark.parametrize("name", [VLLM])
def test_a_normaliser_with_undefined_rows_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_vllm()
    monkeypatch.setattr(vllm_model, "_cut_vocabulary", lambda *_: None)
    with pytest.raises(ConfigError, match=r"vLLM's probabilities of the 90 defined ids sum to 0\.\d+ and not to 1"):
        load(name, save_hostile_teacher(tmp_path / "hostile"))
