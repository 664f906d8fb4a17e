"""What may be asked of the hub, and what a hub that cannot be reached costs."""

import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from opd.errors import ConfigError
from services.trainer.hub import check_hub, looks_like_a_path
from services.trainer.models import load_model
from services.trainer.prompts import load_problems


@pytest.mark.parametrize(
    "name", ["gpt2", "Qwen/Qwen2.5-0.5B", "owner/set-v1.1", "org_1/DAPO-Math-17k", "HuggingFaceH4/MATH-500"]
)
def test_names_of_the_hub(name: str) -> None:
    assert not looks_like_a_path(name)


@pytest.mark.parametrize(
    "name",
    ["/a", "./a", "../a", "~/a", ".", "a/b/c", "a/", "problems.json", "owner/problems.parquet", "model.safetensors",
     "with space", "a\\b", "", "tests/nothing"],
)  # fmt: skip
def test_paths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    assert looks_like_a_path(name)


@pytest.fixture
def lost_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens on port 1 of this machine."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")


@pytest.mark.usefixtures("lost_hub")
def test_a_hub_that_cannot_be_reached_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for name, load in (("data", load_problems), ("model", load_model)):
        with pytest.raises(ConfigError, match=rf"{name} nobody/nothing: .*cannot be reached; correct") as caught:
            load("nobody/nothing")
        assert "\n" not in str(caught.value)
    assert slept == []


@pytest.mark.usefixtures("lost_hub")
def test_what_is_cached_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    check_hub("data", "nobody/nothing", is_cached=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_hub("data", "nobody/nothing", is_cached=False)


@pytest.mark.parametrize("data", ["nowhere/at/all", "no-such.json", "tests/no-such-set", "~/set", "./set"])
def test_a_missing_file_never_goes_to_the_hub(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    with pytest.raises(ConfigError, match=r"no such file; give a \.parquet or \.jsonl file or a data set name"):
        load_problems(data)
