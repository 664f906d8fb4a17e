"""Debian's Prometheus scrapes real processes with our rules, and its API tells what they come to."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from opd.wire.messages import encode_request
from opd.wire.pb import teacher_pb2 as pb
from tests.integration.deploy.conftest import Installation, Service, Services, wait_until
from tests.integration.queue.test_pool_service import bury_one
from tests.unit.deploy.monitoring import PROMETHEUS, RULE_FILES, alerts, find_tool, rules
from tests.unit.teacher_server.tiny_teachers import make_request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Prometheus:
    """A running Prometheus on loopback and its API."""

    def __init__(self, services: Services, folder: Path, targets: dict[str, list[int]]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        config: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(path) for path in RULE_FILES]
        jobs = [job["job_name"] for job in config["scrape_configs"]]
        assert set(targets) <= set(jobs), "a job of the shipped configuration was renamed"
        config["scrape_configs"] = [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in targets.get(job, [])]}]}
            for job in jobs
        ]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        self.service: Service = services.start(
            "prometheus", find_tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{self._port}",
        )  # fmt: skip
        self.service.wait_for("Server is ready")

    def api(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}"
        answer = httpx.get(url, params=parameters, trust_env=False, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(self.api("query", query=expression)["result"])

    def alert_states(self) -> dict[str, str]:
        return {alert["labels"]["alertname"]: alert["state"] for alert in self.api("alerts")["alerts"]}


def test_rules_hold_on_what_real_processes_expose(installation: Installation, tmp_path: Path) -> None:
    find_tool("prometheus")
    services = installation.services
    asyncio.run(bury_one(installation.redis_url))
    _, second_pool = services.pool(installation.redis_url, "qwen")
    teachers = [installation.port(name) for name in installation.teachers]
    # Nobody listens on port 1: a replica that is gone.
    targets = {"opd-teacher": [*teachers, 1], "opd-pool": [installation.pool_port, second_pool]}
    prometheus = Prometheus(services, tmp_path, targets)
    wait_until(lambda: len(prometheus.query('up{job=~"opd-.*"} == 1')) == 4, said=lambda: prometheus.service.log)
    assert {found["metric"]["teacher"] for found in prometheus.query("opd_pool_replicas == 1")} == {"post", "big"}
    assert len(prometheus.query("opd_teacher_ready == 1")) == 2
    # Real dead letters, and a replica that does not answer.
    wait_until(lambda: prometheus.alert_states().get("OpdPoolDeadLetters") == "firing", 30)
    wait_until(lambda: prometheus.alert_states().get("OpdTeacherDown") == "pending", 30)
    (letter,) = [alert for alert in prometheus.api("alerts")["alerts"] if alert["state"] == "firing"]
    assert letter["labels"] == {"alertname": "OpdPoolDeadLetters", "severity": "warning", "teacher": "qwen"}
    assert letter["annotations"]["runbook"] == "docs/runbook.md#opdpooldeadletters"
    # Replicas by what they serve, those that nobody has asked yet among them: what the alert on balance compares.
    wait_until(lambda: len(prometheus.query("instance:opd_teacher_served_tokens:rate5m")) == 2, 30)
    served = {found["metric"]["instance"]: found["metric"] for found in prometheus.query("opd_teacher_info")}
    for found in prometheus.query("instance:opd_teacher_served_tokens:rate5m"):
        labels = ("job", "teacher", "fingerprint")
        assert [found["metric"][name] for name in labels] == [served[found["metric"]["instance"]][n] for n in labels]
    assert {found["teacher"] for found in served.values()} == {"post", "big"}
    loaded = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
    assert len(loaded) == len(rules()) and {rule["health"] for rule in loaded} == {"ok"}
    assert {rule["name"] for rule in loaded if rule["type"] == "alerting"} == set(alerts())
    assert prometheus.service.end() == 0


async def test_a_newer_peers_request_is_scored_by_a_real_teacher(installation: Installation) -> None:
    """Bytes with a field that this version does not know, as a trainer of the next one may send them."""
    # Field 2000, a string.
    body = encode_request(make_request(1, teacher="post")) + b"\x82\x7d\x05newer"
    async with grpc.aio.insecure_channel(f"127.0.0.1:{installation.teachers['post'].note['grpc_port']}") as channel:
        call = channel.unary_unary("/opd.v1.TeacherService/Score")
        answer = pb.ScoreResponse.FromString(await call(body, timeout=60))
    assert answer.reply.WhichOneof("outcome") == "scores"
