"""A pool that sleeps, wakes, grows and sleeps again: the autoscale component on the demo overlay, with real processes.

Everything runs as the rendered manifests say (`pods.py`), Redis with its users and the students with their tokens; the
autoscaler follows the rendered ScaledObject, with its times divided by HASTE.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import yaml

from opd.client import SyncScoreClient
from opd.credentials import Credentials
from opd.types import ScoreRequest
from tests.integration.autoscale.autoscaler import Autoscaler, Decision
from tests.integration.autoscale.pods import Cluster, wait_for
from tests.kubernetes import MANIFESTS, component, make_secrets, missing, named, relative, render_text, workloads

HASTE = 90.0
NUM_REQUESTS, NUM_PROMPT, NUM_RESPONSE = 160, 40, 120
# What a reader would set by its own measurements: the two small cores of a test, and little to wait for.
PATCH = [
    {"op": "replace", "path": "/spec/maxReplicaCount", "value": 2},
    {"op": "replace", "path": "/spec/triggers/0/metadata/targetValue", "value": "8192"},
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if shutil.which("redis-server") is None or " v=7" not in version_of("redis-server"):
        missing("redis-server 7")
    folder = tmp_path_factory.mktemp("cluster")
    overlay = folder / "overlay"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "namespace": "opd",
                "resources": [relative(MANIFESTS / "overlays/cpu-demo", overlay)],
                "components": [relative(MANIFESTS / "components/autoscale", overlay)],
                "patches": [{"target": {"kind": "ScaledObject"}, "patch": yaml.safe_dump(PATCH)}],
            }
        )
    )
    objects = list(yaml.safe_load_all(render_text(overlay)))
    found = Cluster(folder, objects, make_secrets(folder / "secrets", ["teacher"], ["student"]))
    yield found
    found.close()


def version_of(server: str) -> str:
    return subprocess.run([server, "--version"], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def autoscaler(cluster: Cluster) -> Iterator[Autoscaler]:
    """With Redis and the pool's status up, and one replica that loads its model."""
    cluster.start("redis")
    wait_for(lambda: cluster.probe("redis"), "redis")
    cluster.start("pool-status")
    wait_for(lambda: status_code(cluster, "/healthz") == 200, "the pool's status")
    found = Autoscaler(cluster, named(cluster.objects, "ScaledObject", "opd-teacher"), HASTE)
    yield found
    found.stop()


def url_of(cluster: Cluster, path: str) -> str:
    return f"http://127.0.0.1:{cluster.ports['opd-pool-status.opd.svc:8090']}{path}"


def status_code(cluster: Cluster, path: str) -> int:
    try:
        return httpx.get(url_of(cluster, path), trust_env=False, timeout=5).status_code
    except httpx.HTTPError:
        return 0


def pool_of(cluster: Cluster) -> dict[str, object]:
    answer = httpx.get(url_of(cluster, "/v1/pool"), trust_env=False, timeout=5)
    found: dict[str, object] = answer.json()["teachers"]["teacher"]
    return found


def totals_of(cluster: Cluster) -> dict[str, int]:
    return dict(pool_of(cluster)["totals"])  # type: ignore[call-overload]


def completed(cluster: Cluster) -> int:
    return totals_of(cluster)["completed"]


def wait_for_sleep(cluster: Cluster, autoscaler: Autoscaler) -> None:
    """No process and no replica in Redis; all ended in order."""
    wait_for(lambda: not autoscaler.teachers, "the pool at zero", 240)
    for teacher in autoscaler.ended:
        assert teacher.process.wait() == 0, teacher.process.log
    wait_for(lambda: pool_of(cluster)["replicas"] == [], "the last sign of life")


def test_an_idle_pool_goes_to_zero_once_it_has_left_its_handshake(cluster: Cluster, autoscaler: Autoscaler) -> None:
    (first,) = autoscaler.teachers
    wait_for(lambda: first.is_ready, "the first replica")
    assert autoscaler.history == [1]
    autoscaler.decision.may_sleep = True
    wait_for_sleep(cluster, autoscaler)
    assert autoscaler.history == [1, 0]
    assert pool_of(cluster)["is_known"] is True


def test_a_students_first_request_wakes_it_and_nothing_is_lost(cluster: Cluster, autoscaler: Autoscaler) -> None:
    """The Job as it is, but for fewer and smaller steps."""
    assert autoscaler.teachers == []
    trainer = cluster.start(
        "trainer", "steps=2", "optim.warmup_steps=1", "rollout.prompts_per_step=4", "rollout.max_response_tokens=64",
        "evaluation.files=[]", "http.port=0",
    )  # fmt: skip
    assert trainer.wait(700) == 0, trainer.log
    (summary,) = cluster.folder.glob("claims-trainer/runs/demo/train_summary.json")
    counts = json.loads(summary.read_text(encoding="utf-8"))
    assert (counts["steps"], counts["rollouts_sent"], counts["rollouts_scored"], counts["rollouts_lost"]) == (
        2,
        32,
        32,
        0,
    )
    assert autoscaler.history[2] == 1
    # The same pod again finds the run finished, on the volume that outlives it.
    again = cluster.start("trainer", "steps=2", "optim.warmup_steps=1", "rollout.prompts_per_step=4",
                          "rollout.max_response_tokens=64", "evaluation.files=[]", "http.port=0")  # fmt: skip
    assert again.wait() == 0, again.log
    assert json.loads(summary.read_text(encoding="utf-8"))["steps"] == 2


def test_a_backlog_makes_it_grow_and_its_end_lets_it_sleep(cluster: Cluster, autoscaler: Autoscaler) -> None:
    """Requests of equal tokens in pairs, so that answers of different replicas can be compared."""
    wait_for_sleep(cluster, autoscaler)
    num_before, random = len(autoscaler.history), np.random.default_rng(0)
    before = completed(cluster)
    texts = random.integers(4, 20, (NUM_REQUESTS // 2, NUM_PROMPT + NUM_RESPONSE), dtype=np.int32)
    requests = [
        ScoreRequest(
            rollout_id=f"burst.0.{index}",
            tenant="student",
            teacher="teacher",
            prompt_token_ids=texts[index // 2, :NUM_PROMPT],
            response_token_ids=texts[index // 2, NUM_PROMPT:],
            timeout_ms=600_000,
        )
        for index in range(NUM_REQUESTS)
    ]
    url = f"redis://127.0.0.1:{cluster.ports['opd-redis:6379']}/0"
    token = cluster.secret("opd-token-student", "token").strip()
    with SyncScoreClient.connect(
        url, teacher="teacher", tenant="student", credentials=Credentials(token=token)
    ) as client:
        answers = [future.result(500) for future in [client.submit(request) for request in requests]]
    scores = np.stack([answer.scores.sampled_logprobs for answer in answers])
    assert scores.shape == (NUM_REQUESTS, NUM_RESPONSE) and np.isfinite(scores).all()
    np.testing.assert_allclose(scores[::2], scores[1::2], atol=1e-4)
    assert [answer.rollout_id for answer in answers] == [request.rollout_id for request in requests]
    # The pool status process looks at Redis every now and then.
    wait_for(lambda: completed(cluster) >= before + NUM_REQUESTS, "the last answers to be counted")
    assert autoscaler.history[num_before] == 1 and max(autoscaler.history[num_before:]) == 2
    wait_for_sleep(cluster, autoscaler)
    assert autoscaler.history[-1] == 0
    # None twice, and none given up on.
    assert completed(cluster) == before + NUM_REQUESTS and totals_of(cluster).get("dead", 0) == 0


def test_a_value_that_cannot_be_read_changes_nothing(cluster: Cluster) -> None:
    """The arithmetic of the autoscaler that is played here, on its own."""
    decision = Decision(named(cluster.objects, "ScaledObject", "opd-teacher"), 1.0)
    assert decision.replicas(None, 2, 1e6) == 2
    assert decision.replicas(9_000, 1, 0.0) == 2
    assert decision.replicas(90_000, 2, 1.0) == 2, "the most there may be"
    assert decision.replicas(1, 2, 100.0) == 2, "two were wanted a moment ago"
    assert decision.replicas(1, 2, 700.0) == 1
    assert decision.replicas(0, 1, 2000.0) == 1, "the first replica may be loading still"
    decision.may_sleep = True
    assert decision.replicas(0, 1, 1599.0) == 1
    assert decision.replicas(0, 1, 1601.0) == 0
    assert decision.replicas(0, 0, 1602.0) == 0
    assert decision.replicas(1, 0, 1603.0) == 1


def test_the_demo_has_what_runs_here(cluster: Cluster) -> None:
    assert sorted(component(found) for found in workloads(cluster.objects)) == [
        "pool-status", "redis", "teacher", "trainer",
    ]  # fmt: skip
