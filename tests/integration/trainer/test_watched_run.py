"""A whole run that an alarm ends: what is told, what is saved, and that it goes on when it is told to."""

import importlib.util
from pathlib import Path

import pytest

from opd.queue.embedded import EmbeddedRedis
from services.trainer.run_log import read_steps
from tests.integration.trainer.test_several_teachers import events
from tests.integration.trainer.test_training_processes import (
    Processes,
    check_complete,
    finish,
    models,
    processes,
    redis,
    said,
    summary,
)

__all__ = ["models", "processes", "redis"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_an_alarm_ends_the_run_in_order_and_it_can_be_resumed(
    redis: EmbeddedRedis, processes: Processes, tmp_path: Path
) -> None:
    """Two random models share few of their six most likely ids, so that supports of one id are common."""
    processes.teacher(redis.url)
    has_tensorboard = importlib.util.find_spec("tensorboardX") is not None
    given = (
        *("steps=4", "objective.support=overlap", "checkpoint.every_steps=0", "metrics.coherence_every_steps=2"),
        *('alarms.stop=["small_supports"]', "metrics.fraction=0.5"),
        f"loggers.tensorboard={str(has_tensorboard).lower()}",
    )
    stopped = processes.trainer(redis.url, *given)
    run_dir = tmp_path / "run"
    assert finish(stopped) == 3, said(stopped)
    assert "stopped by alarm small_supports after step 3" in said(stopped)
    assert "raise objective.score_top_k to 4 or more, or choose a wider objective.support (paper 6.3)" in said(stopped)
    (alarm,) = [event for event in events(run_dir, "alarm") if event["name"] == "small_supports"]
    assert alarm["step"] == 3 and alarm["numbers"]["small_support_fraction"] > 0.05
    assert (summary(run_dir)["state"], summary(run_dir)["steps"]) == ("stopped", 3)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000003"]
    resumed = processes.trainer(redis.url, *given, "--resume")
    assert finish(resumed) == 0, said(resumed)
    check_complete(run_dir, 4)
    records = read_steps(run_dir)
    measured = {record["step"]: record.get("distill/gradient_coherence") for record in records}
    assert [step for step, value in measured.items() if value is not None] == [1, 2, 4]
    assert all(0 < measured[step] <= 1 for step in (1, 2, 4))
    assert len(list((run_dir / "tensorboard").glob("events.*"))) == 2 * has_tensorboard
