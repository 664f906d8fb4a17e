"""The trainer's status over real HTTP on loopback."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from opd.errors import ConfigError
from services.trainer.http_api import RunStatus, StatusServer


@pytest.fixture
def status() -> RunStatus:
    return RunStatus()


@pytest.fixture
def server(status: RunStatus) -> Iterator[StatusServer]:
    server = StatusServer(status, host="127.0.0.1", port=0)
    server.start()
    yield server
    server.close()


def fetch(server: StatusServer, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_alive_at_once_ready_only_while_training(server: StatusServer, status: RunStatus) -> None:
    assert fetch(server, "/healthz") == (200, '{"status":"alive"}')
    assert fetch(server, "/readyz") == (503, '{"status":"starting"}')
    status.begin(0, 10)
    assert fetch(server, "/readyz") == (200, '{"status":"training"}')
    status.enter("finished")
    assert fetch(server, "/readyz") == (503, '{"status":"finished"}')


def test_run_tells_step_metrics_and_remaining_time(server: StatusServer, status: RunStatus) -> None:
    status.begin(4, 10)
    assert json.loads(fetch(server, "/v1/run")[1])["eta_s"] is None
    status.finish_step(6, {"loss/reverse_kl": 0.25})
    told = json.loads(fetch(server, "/v1/run")[1])
    assert (told["state"], told["step"], told["num_steps"]) == ("training", 6, 10)
    assert told["metrics"] == {"loss/reverse_kl": 0.25}
    # Two steps took some time and four are left: the estimate is twice what has passed.
    assert told["eta_s"] > 0


def test_alarms_are_told_until_they_are_over(server: StatusServer, status: RunStatus) -> None:
    assert json.loads(fetch(server, "/v1/run")[1])["alarms"] == []
    alarm = {"name": "gradient_spike", "step": 3, "evidence": "norm 3 at step 3", "numbers": {"norm": 3.0}}
    status.show_alarms((alarm,))
    assert json.loads(fetch(server, "/v1/run")[1])["alarms"] == [alarm]
    assert 'opd_trainer_alarm{name="gradient_spike"} 1.0' in fetch(server, "/metrics")[1].splitlines()
    status.show_alarms(())
    assert 'name="gradient_spike"' not in fetch(server, "/metrics")[1]


def test_metrics_are_gauges_with_legal_names(server: StatusServer, status: RunStatus) -> None:
    status.begin(0, 2)
    status.finish_step(1, {"loss/reverse_kl": 0.5, "timing/step": 2.0})
    lines = fetch(server, "/metrics")[1].splitlines()
    assert "opd_trainer_loss_reverse_kl 0.5" in lines
    assert "opd_trainer_timing_step 2.0" in lines
    assert "opd_trainer_step 1.0" in lines
    assert "opd_trainer_ready 1.0" in lines


def test_a_taken_port_is_one_line_that_names_it(server: StatusServer, status: RunStatus) -> None:
    with pytest.raises(ConfigError, match=rf"^http\.port={server.port}: .*choose another, or 0 for any free one$"):
        StatusServer(status, host="127.0.0.1", port=server.port)


def test_closing_frees_thread_and_port(status: RunStatus) -> None:
    before = threading.active_count()
    server = StatusServer(status, host="127.0.0.1", port=0)
    server.start()
    server.close()
    assert threading.active_count() == before
    again = StatusServer(status, host="127.0.0.1", port=server.port)
    again.close()
