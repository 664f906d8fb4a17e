"""Tokens, rights and TLS as callers meet them: a real gRPC server, a real HTTP server, a fake engine."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry, Gauge

from opd.client import ScoreClient
from opd.credentials import Credentials
from opd.errors import (
    ConfigError,
    InvalidRequestError,
    PermissionDeniedError,
    TeacherUnavailableError,
    UnauthenticatedError,
    UnsupportedError,
)
from opd.metrics import TeacherMetrics
from opd.rpc.client import GrpcScoreClient
from opd.rpc.status import error_from_rpc
from opd.wire.messages import request_to_proto
from opd.wire.pb import teacher_pb2 as pb
from opd.wire.pb.teacher_pb2_grpc import TeacherServiceStub
from services.teacher_server.batcher import BatchLimits, FairBatcher
from services.teacher_server.canary import Canary
from services.teacher_server.config import GrpcSettings, HttpSettings, TlsSettings
from services.teacher_server.gate import Gate
from services.teacher_server.grpc_api import GrpcServer
from services.teacher_server.guarded_engine import GuardedEngine
from services.teacher_server.http_api import HttpServer, create_app
from services.teacher_server.http_gate import HttpGate
from services.teacher_server.readiness import Part, Readiness
from services.teacher_server.scoring import ScoringSlot, TeacherScoring
from services.teacher_server.tenant_registry import TenantRegistry
from services.teacher_server.tenants_file import add_tenant, remove_tenant
from tests.certificates import Authority, Pair
from tests.unit.teacher_server.fake_engine import FakeEngine
from tests.unit.teacher_server.tiny_teachers import make_request

MATH, CODE = "math-token", "code-token"


class Service:
    """One replica's shells behind one gate."""

    def __init__(self, folder: Path, executor: ThreadPoolExecutor, grpc_tls: TlsSettings, http: HttpSettings) -> None:
        folder.mkdir(exist_ok=True)
        self.tenants = folder / "tenants.toml"
        rights: dict[str, Any] = {"weight": 1.0, "max_inflight_tokens": None}
        add_tenant(self.tenants, "math", MATH, hidden_states=False, **rights)
        add_tenant(self.tenants, "code", CODE, hidden_states=True, **rights)
        self.engine, readiness, metrics = FakeEngine(), Readiness(), TeacherMetrics()
        self.readiness, self.metrics = readiness, metrics
        self.registry = TenantRegistry(self.tenants, sound=Gauge("s", "s", registry=CollectorRegistry()))
        self.scoring = TeacherScoring(
            GuardedEngine(self.engine, Canary(self.engine)),
            FairBatcher(BatchLimits()),
            executor,
            readiness=readiness,
            metrics=metrics,
            replica="r1",
            linger_s=0.0,
        )
        slot, gate = ScoringSlot(), Gate(self.registry)
        slot.fill(self.scoring)
        readiness.clear(Part.START)
        self.grpc = GrpcServer(GrpcSettings(tls=grpc_tls), slot, readiness, gate, metrics=metrics)
        self.http = HttpServer(create_app(slot, readiness, metrics, http, gate), http)
        self.grpc_port = self.http_port = 0


@asynccontextmanager
async def serving(
    folder: Path, *, grpc_tls: TlsSettings | None = None, http: HttpSettings | None = None
) -> AsyncIterator[Service]:
    with ThreadPoolExecutor(1) as executor:
        service = Service(folder, executor, grpc_tls or TlsSettings(), http or HttpSettings())
        service.http_port, service.grpc_port = service.http.bind(), await service.grpc.start()
        tasks = [asyncio.create_task(service.http.run()), asyncio.create_task(service.scoring.run())]
        try:
            yield service
        finally:
            await service.grpc.stop(0.5)
            service.http.stop()
            await tasks[0]
            tasks[1].cancel()
            with suppress(asyncio.CancelledError):
                await tasks[1]


def client_of(service: Service, token: str | None = MATH, **options: Any) -> GrpcScoreClient:
    scheme = "grpcs" if "ca_file" in options else "grpc"
    return GrpcScoreClient(f"{scheme}://127.0.0.1:{service.grpc_port}", credentials=Credentials(token=token, **options))


async def test_a_tenant_asks_in_its_own_name_only(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, client_of(service) as client:
        assert (await client.info()).teacher == "tiny"
        assert (await client.score(make_request(1))).replica == "r1"
        with pytest.raises(PermissionDeniedError, match="tenant='code': the token is that of math"):
            await client.score(make_request(2, tenant="code"))
        assert service.engine.scored == [["run.0.1"]]


@pytest.mark.parametrize("token", [None, "wrong", ""])
async def test_without_a_token_nothing_is_told(tmp_path: Path, token: str | None) -> None:
    async with serving(tmp_path) as service, client_of(service, token) as client:
        for ask in (client.info(), client.score(make_request())):
            with pytest.raises(UnauthenticatedError, match="authorization: "):
                await ask
        assert service.engine.scored == []


async def test_a_message_is_not_decoded_before_its_token_is_known(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, grpc.aio.insecure_channel(f"127.0.0.1:{service.grpc_port}") as channel:
        score = channel.unary_unary("/opd.v1.TeacherService/Score")
        for metadata, error_type in (
            ((), UnauthenticatedError),
            ((("authorization", f"Bearer {MATH}"),), InvalidRequestError),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await score(b"\xff\xff not a message", metadata=metadata)
            assert isinstance(error_from_rpc(caught.value, "t"), error_type)


async def test_health_and_reflection_are_open(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, grpc.aio.insecure_channel(f"127.0.0.1:{service.grpc_port}") as channel:
        await asyncio.sleep(0)
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in stub.ServerReflectionInfo(iter([request])):
            assert "opd.v1.TeacherService" in str(answer)
            break


async def test_hidden_states_and_the_output_head_are_a_right_of_their_own(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, grpc.aio.insecure_channel(f"127.0.0.1:{service.grpc_port}") as channel:
        stub = TeacherServiceStub(channel)

        async def error_of(method: str, message: Any, token: str) -> Any:
            call = getattr(stub, method)(message, metadata=(("authorization", f"Bearer {token}"),))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                if method == "Score":
                    await call
                else:
                    await call.read()
            return error_from_rpc(caught.value, "t")

        for tenant, token, is_allowed in (("math", MATH, False), ("code", CODE, True)):
            request = request_to_proto(make_request(1, tenant=tenant))
            request.wants_hidden_states = True
            asked = (
                ("GetOutputHead", pb.GetOutputHeadRequest()),
                ("ScoreStream", pb.ScoreStreamRequest(request=request)),
                ("Score", request),
            )
            for method, message in asked:
                error = await error_of(method, message, token)
                # This engine has none to give, which it says to whoever may ask.
                expected = (UnsupportedError, InvalidRequestError) if is_allowed else PermissionDeniedError
                assert isinstance(error, expected), (method, error)
        assert isinstance(await error_of("GetOutputHead", pb.GetOutputHeadRequest(), "x"), UnauthenticatedError)
        other = pb.ScoreStreamRequest(request=request_to_proto(make_request(tenant="math")))
        assert isinstance(await error_of("ScoreStream", other, CODE), PermissionDeniedError)


async def test_a_removed_tenant_is_refused_from_then_on(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, client_of(service) as client:
        await client.score(make_request(1))
        remove_tenant(service.tenants, "math")
        assert service.registry.reload_if_changed()
        with pytest.raises(UnauthenticatedError, match="the token is nobody's"):
            await client.score(make_request(2))
        async with client_of(service, CODE) as other:
            await other.score(make_request(3, tenant="code"))


async def test_tls_and_mutual_tls(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs", "other")
    server, client_pair, stranger = ours.issue("server"), ours.issue("client"), theirs.issue("stranger")
    pair = {"cert_file": server.cert_file, "key_file": server.key_file}

    async def can_score(service: Service, **options: Any) -> bool:
        async with client_of(service, **options) as client:
            try:
                await client.score(make_request(1, timeout_ms=3000))
            except TeacherUnavailableError:
                return False
            return True

    async with serving(tmp_path / "tls", grpc_tls=TlsSettings(**pair)) as service:
        assert await can_score(service, ca_file=ours.ca_file)
        assert not await can_score(service, ca_file=theirs.ca_file)
    mutual = TlsSettings(**pair, client_ca_file=ours.ca_file)
    async with serving(tmp_path / "mtls", grpc_tls=mutual) as service:
        mine = {"cert_file": client_pair.cert_file, "key_file": client_pair.key_file}
        not_mine = {"cert_file": stranger.cert_file, "key_file": stranger.key_file}
        assert await can_score(service, ca_file=ours.ca_file, **mine)
        assert not await can_score(service, ca_file=ours.ca_file)
        assert not await can_score(service, ca_file=ours.ca_file, **not_mine)
        url, credentials = (
            f"grpcs://127.0.0.1:{service.grpc_port}",
            Credentials(token=MATH, ca_file=ours.ca_file, **mine),
        )
        async with ScoreClient.connect(url, teacher="tiny", tenant="math", credentials=credentials) as client:
            assert (await client.info()).teacher == "tiny"


async def test_http_over_tls_with_tokens(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    pair = authority.issue("server")
    http = HttpSettings(tls=TlsSettings(cert_file=pair.cert_file, key_file=pair.key_file))
    async with serving(tmp_path, http=http) as service:
        context = ssl.create_default_context(cafile=str(authority.ca_file))
        url = f"https://127.0.0.1:{service.http_port}"
        async with httpx.AsyncClient(base_url=url, verify=context, trust_env=False) as client:
            body = {"prompt_token_ids": [1], "response_token_ids": [2]}
            headers = {"authorization": f"Bearer {MATH}"}
            assert (await client.post("/v1/score", json=body, headers=headers)).status_code == 200
            other = await client.post("/v1/score", json=body | {"tenant": "code"}, headers=headers)
            assert (other.status_code, other.json()["error"]["code"]) == (403, "permission_denied")
            none = await client.post("/v1/score", json=body)
            assert (none.status_code, none.headers["www-authenticate"]) == (401, "Bearer")
            assert (await client.get("/v1/info")).status_code == 401
            assert (await client.get("/v1/info", headers=headers)).status_code == 200
            for open_path in ("/healthz", "/readyz", "/metrics"):
                assert (await client.get(open_path)).status_code == 200
            assert 'opd_teacher_requests_total{tenant="math"} 1.0' in (await client.get("/metrics")).text


async def test_a_url_that_speaks_the_wrong_way_says_which_to_write(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    pair = authority.issue("server")
    tls = TlsSettings(cert_file=pair.cert_file, key_file=pair.key_file)
    mutual = TlsSettings(cert_file=pair.cert_file, key_file=pair.key_file, client_ca_file=authority.ca_file)
    for number, (settings, given, right) in enumerate(
        (
            (tls, "grpc", "speaks TLS; write grpcs"),
            (mutual, "grpc", "speaks TLS; write grpcs"),
            (None, "grpcs", "does not speak TLS; write grpc"),
        )
    ):
        async with serving(tmp_path / str(number), grpc_tls=settings) as service:
            place = f"127.0.0.1:{service.grpc_port}"
            client = ScoreClient.connect(f"{given}://{place}", teacher="tiny", tenant="math")
            async with client:
                # Not tried again: it is an error of the URL's.
                for ask in (client.info(), client.score(make_request())):
                    with pytest.raises(ConfigError, match=rf"^url={given}://{place}: {right}://{place}$"):
                        await ask


async def test_mutual_tls_over_http(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs", "other")
    server, client_pair, stranger = ours.issue("server"), ours.issue("client"), theirs.issue("stranger")
    tls = TlsSettings(cert_file=server.cert_file, key_file=server.key_file, client_ca_file=ours.ca_file)
    async with serving(tmp_path, http=HttpSettings(tls=tls)) as service:

        async def ask(pair: Pair | None, path: str, **headers: str) -> int:
            context = ssl.create_default_context(cafile=str(ours.ca_file))
            if pair is not None:
                context.load_cert_chain(pair.cert_file, pair.key_file)
            url = f"https://127.0.0.1:{service.http_port}"
            async with httpx.AsyncClient(base_url=url, verify=context, trust_env=False) as client:
                return (await client.get(path, headers=headers)).status_code

        assert await ask(client_pair, "/v1/info", authorization=f"Bearer {MATH}") == 200
        # A certificate opens the connection and stands for nobody.
        assert await ask(client_pair, "/v1/info") == 401
        for refused in (None, stranger):
            for path in ("/v1/info", "/healthz"):
                with pytest.raises(httpx.TransportError):
                    await ask(refused, path, authorization=f"Bearer {MATH}")
        assert await ask(client_pair, "/healthz") == 200


async def test_http_asks_for_the_token_before_it_reads_a_body(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.http_port)
        writer.write(b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
        answer = await asyncio.wait_for(reader.readline(), 5)
        assert b" 401 " in answer
        writer.close()
        # A length that chunks would make a lie of.
        reader, writer = await asyncio.open_connection("127.0.0.1", service.http_port)
        head = f"host: x\r\nauthorization: Bearer {MATH}\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(b"POST /v1/score HTTP/1.1\r\n" + head.encode())
        assert b" 400 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()


def plain_http(service: Service) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{service.http_port}", trust_env=False)


async def test_metrics_may_want_a_token_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "metrics.token").write_text("scrape\n")
    http = HttpSettings(metrics_token_file=tmp_path / "metrics.token")
    async with serving(tmp_path, http=http) as service, plain_http(service) as client:
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers={"authorization": f"Bearer {MATH}"})).status_code == 401
        assert (await client.get("/metrics", headers={"authorization": "Bearer scrape"})).status_code == 200


async def test_metrics_are_shut_where_others_listen(tmp_path: Path) -> None:
    async with serving(tmp_path, http=HttpSettings(host="0.0.0.0")) as service, plain_http(service) as client:
        answer = await client.get("/metrics")
        assert answer.status_code == 403 and "set http.metrics_token_file" in answer.text


def test_files_that_are_no_certificates_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("no")
    for path, message in ((tmp_path / "x.pem", "is no PEM file"), (tmp_path / "none", "cannot be read")):
        http = HttpSettings(tls=TlsSettings(cert_file=path, key_file=path))
        with pytest.raises(ConfigError, match=message):
            HttpServer(create_app(ScoringSlot(), Readiness(), TeacherMetrics(), http), http)


def registry(folder: Path) -> TenantRegistry:
    add_tenant(folder / "t.toml", "math", MATH, hidden_states=False, weight=1.0, max_inflight_tokens=None)
    return TenantRegistry(folder / "t.toml", sound=Gauge("s", "s", registry=CollectorRegistry()))


async def test_a_host_header_opens_no_path(tmp_path: Path) -> None:
    """Routing goes by the path; the URL that is put together from headers may say another one."""
    async with serving(tmp_path) as service, plain_http(service) as client:
        answer = await client.post("/v1/score", headers={"host": "x/healthz?"}, content=b"{}")
        assert answer.status_code in (400, 401)
    request = SimpleNamespace(
        scope={"path": "/v1/score"}, url=SimpleNamespace(path="/healthz"), headers={}, method="GET",
        state=SimpleNamespace(),
    )  # fmt: skip
    with pytest.raises(UnauthenticatedError):
        HttpGate(Gate(registry(tmp_path)), HttpSettings()).enter(request)  # type: ignore[arg-type]


def test_nobody_has_no_rights_where_tenants_are_told_apart(tmp_path: Path) -> None:
    gate = Gate(registry(tmp_path))
    with pytest.raises(UnauthenticatedError):
        gate.check_request(None, "math")
    with pytest.raises(UnauthenticatedError):
        gate.check_hidden_states(None)
