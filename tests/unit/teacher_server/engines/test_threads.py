import os
from collections.abc import Iterator

import pytest
import torch

from services.teacher_server.engines.transformers_engine import set_threads


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_number_is_taken_and_zero_leaves_a_core_to_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    set_threads(2)
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    set_threads(0)
    assert torch.get_num_threads() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    set_threads(0)
    assert torch.get_num_threads() == 1


def test_what_the_environment_decided_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    set_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    set_threads(0)
    assert torch.get_num_threads() == 2
