"""The composition root of a teacher replica: builds the parts, wires them, runs them, ends them in order.

Start: listeners (a taken port is told at once, health can be asked), model, canary, queue. End: no new work, hand back
what has not begun, finish what has, close servers, then the engine; the log says clean or forced, with counts. A
background task that ends ends the process: nothing dies in silence.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from opd.lifecycle import Shutdown, die_with_parent
from opd.logs import configure_logging
from opd.metrics import TeacherMetrics, watch_loop_lag
from opd.settings import load_settings
from opd.tracing import configure_tracing
from services.teacher_server.batcher import BatchLimits, FairBatcher
from services.teacher_server.canary import Canary
from services.teacher_server.config import TeacherConfig
from services.teacher_server.engines.base import ForwardObserver, ForwardReport, ScoringEngine
from services.teacher_server.engines.model_folder import check_model
from services.teacher_server.gate import Gate
from services.teacher_server.grpc_api import GrpcServer
from services.teacher_server.guarded_engine import GuardedEngine
from services.teacher_server.http_api import HttpServer, create_app
from services.teacher_server.queue_intake import QueueIntake, connect_queue
from services.teacher_server.readiness import Part, Readiness
from services.teacher_server.ready_file import write_ready_file
from services.teacher_server.scoring import ScoringSlot, TeacherScoring
from services.teacher_server.tenant_registry import TenantRegistry

_log = logging.getLogger(__name__)
EXIT_CLEAN, EXIT_FAULT = 0, 1
_STALL_LOOK_S = 0.5


def run_teacher(config_path: Path | None, overrides: Sequence[str], ready_file: Path | None = None) -> int:
    """Serves until SIGTERM or SIGINT and returns the exit code; raises an OpdError for what the user can mend."""
    config = load_settings(TeacherConfig, config_path, overrides)
    check_model(config.model)
    configure_logging(config.log_level, as_json=config.log_json, with_requests=config.log_requests)
    die_with_parent()
    replica = Replica(config, ready_file)
    close_tracing = configure_tracing(config.tracing, service="opd-teacher", instance=replica.name)
    try:
        exit_code = asyncio.run(replica.serve())
    finally:
        close_tracing()
    if replica.is_engine_busy:
        # Leaving in the usual way would wait for the engine thread, which nothing can interrupt.
        logging.shutdown()
        os._exit(exit_code)
    return exit_code


def _load_registry(config: TeacherConfig, metrics: TeacherMetrics) -> TenantRegistry | None:
    if config.tenants_file is None:
        return None
    return TenantRegistry(config.tenants_file, sound=metrics.tenants_file_sound)


class Replica:
    """One teacher process; `make_engine`, called in the engine thread, takes the place of loading the model."""

    def __init__(
        self,
        config: TeacherConfig,
        ready_file: Path | None = None,
        make_engine: Callable[[ForwardObserver], ScoringEngine] | None = None,
    ) -> None:
        self._config = config
        self._make_engine = make_engine or self._load_engine
        self._ready_file = ready_file
        self._name = config.replica or f"{socket.gethostname()}-{os.getpid()}"
        self._readiness = Readiness()
        self._metrics = TeacherMetrics()
        self._slot = ScoringSlot()
        self._shutdown: Shutdown | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._engine_work: asyncio.Future[GuardedEngine] | None = None
        self._scoring: TeacherScoring | None = None
        self._registry = _load_registry(config, self._metrics)
        self._gate = gate = Gate(self._registry)
        chunk_bytes = min(config.hidden_states.chunk_bytes, config.grpc.max_message_bytes // 2)
        self._grpc = GrpcServer(
            config.grpc, self._slot, self._readiness, gate, metrics=self._metrics, chunk_bytes=chunk_bytes
        )
        self._http = HttpServer(create_app(self._slot, self._readiness, self._metrics, config.http, gate), config.http)
        self._queue = connect_queue(config)
        self._intake: QueueIntake | None = None
        self._tasks: dict[str, asyncio.Task[Any]] = {}

    @property
    def name(self) -> str:
        """As it stands in replies."""
        return self._name

    @property
    def is_engine_busy(self) -> bool:
        """The engine thread was still at work when `serve` returned."""
        is_loading = self._engine_work is not None and not self._engine_work.done()
        return is_loading or (self._scoring is not None and self._scoring.is_engine_busy)

    async def serve(self) -> int:
        """From start to end; returns the exit code."""
        self._shutdown = Shutdown()
        self._shutdown.install(asyncio.get_running_loop())
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        is_sound = await self._watch()
        is_clean = await self._stop()
        return EXIT_CLEAN if is_sound and is_clean else EXIT_FAULT

    async def _start(self) -> None:
        """Returns when everything runs, or when the end was asked for before it did."""
        http_port, grpc_port = self._http.bind(), await self._grpc.start()
        self._run("http", self._http.run())
        self._run("loop lag", watch_loop_lag(self._metrics.loop_lag_seconds))
        self._readiness.subscribe(lambda is_ready: self._metrics.ready.set(is_ready))
        _log.info("loading %s; gRPC port %d, HTTP port %d", self._config.model, grpc_port, http_port)
        engine = await self._load()
        if engine is None:
            return
        self._scoring = scoring = self._build_scoring(engine)
        self._follow_tenants()
        self._run("scoring", scoring.run())
        await scoring.check_canary()
        self._slot.fill(scoring)
        self._metrics.know_teacher(scoring.info().teacher, scoring.info().fingerprint)
        self._readiness.clear(Part.START)
        self._run("canary", self._keep_probing(scoring))
        self._run("stall", self._watch_stalls(scoring))
        await self._join_queue(scoring)
        self._tell_ready(grpc_port, http_port)

    async def _load(self) -> GuardedEngine | None:
        """The engine, or None when the end was asked for while it was being loaded."""
        self._engine_work = asyncio.get_running_loop().run_in_executor(self._executor, self._build_engine)
        asked = asyncio.create_task(self._asked.wait())
        either: list[asyncio.Future[Any]] = [self._engine_work, asked]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        return self._engine_work.result() if self._engine_work.done() else None

    def _build_engine(self) -> GuardedEngine:
        engine = self._make_engine(self._observe)
        return GuardedEngine(engine, Canary(engine))

    def _load_engine(self, observe: ForwardObserver) -> ScoringEngine:
        """In the engine thread: torch counts its threads per thread that asks."""
        from services.teacher_server.engines.transformers_engine import EngineLimits, load_engine, set_threads

        config = self._config
        set_threads(config.torch_threads)
        if config.engine == "vllm":
            from services.teacher_server.engines.vllm_engine import load_vllm_engine

            return load_vllm_engine(config, observe)
        return load_engine(
            config.model,
            teacher=config.teacher,
            device=config.device,
            dtype=config.dtype,
            max_context=config.max_context,
            limits=EngineLimits(
                max_batch_tokens=config.batching.max_batch_tokens,
                max_padding_share=config.batching.max_padding_share,
                row_chunk=config.batching.row_chunk,
                prefix_cache_tokens=config.batching.prefix_cache_tokens,
                max_candidates=config.max_candidates,
                max_score_top_k=config.max_score_top_k,
                max_message_bytes=config.grpc.max_message_bytes,
                serves_hidden_states=config.hidden_states.enabled,
            ),
            cache_folder=config.cache_folder.expanduser() if config.cache_folder else None,
            observe=observe,
        )

    def _build_scoring(self, engine: GuardedEngine) -> TeacherScoring:
        batching = self._config.batching
        limits = BatchLimits(
            max_batch_tokens=batching.max_batch_tokens,
            max_batch_requests=batching.max_batch_requests,
            max_direct_tokens=batching.max_direct_tokens,
            max_tenant_tokens=batching.max_tenant_tokens,
            quantum_tokens=batching.quantum_tokens,
        )
        batcher = FairBatcher(limits)
        if self._registry is not None:
            self._registry.subscribe(lambda table: batcher.set_shares(table.weights(), table.caps()))
        return TeacherScoring(
            engine,
            batcher,
            self._executor,
            readiness=self._readiness,
            metrics=self._metrics,
            replica=self._name,
            linger_s=batching.linger_ms / 1000,
        )

    def _follow_tenants(self) -> None:
        if self._registry is not None:
            self._registry.subscribe(lambda table: self._metrics.know_tenants(table.tenants))
            self._run("tenants", self._registry.watch())

    async def _join_queue(self, scoring: TeacherScoring) -> None:
        if self._queue is None:
            return
        intake = QueueIntake(
            self._config,
            self._queue,
            scoring,
            readiness=self._readiness,
            metrics=self._metrics,
            replica=self._name,
            gate=self._gate,
        )
        if self._registry is not None:
            self._registry.subscribe(intake.follow)
        await intake.start()
        self._intake = intake
        self._run("queue", intake.run())
        _log.info("takes from pool %s at redis %s", intake.pool, intake.label)

    def _tell_ready(self, grpc_port: int, http_port: int) -> None:
        assert self._scoring is not None
        info = self._scoring.info()

        def tell(is_ready: bool) -> None:
            if not is_ready:
                _log.warning("not ready: %s", self._readiness.describe())
                return
            _log.info("ready: %s@%s (%s, %s)", info.teacher, info.fingerprint, info.model, info.dtype)
            if self._ready_file is not None:
                write_ready_file(self._ready_file, grpc_port, http_port, info.fingerprint)

        self._readiness.subscribe(tell)

    @property
    def _asked(self) -> asyncio.Event:
        assert self._shutdown is not None
        return self._shutdown.requested

    def _observe(self, report: ForwardReport) -> None:
        """From the engine thread."""
        padding = report.num_padded_tokens - report.num_tokens
        self._metrics.engine_seconds.observe(report.duration_s)
        self._metrics.batch_tokens.observe(report.num_tokens)
        self._metrics.padding_share.observe(padding / max(1, report.num_padded_tokens))
        self._metrics.computed_tokens.inc(report.num_padded_tokens)
        self._metrics.padding_tokens.inc(padding)
        self._metrics.reused_prompt_tokens.inc(report.num_reused_tokens)
        if self._scoring is not None:
            self._scoring.note_progress(report)

    async def _keep_probing(self, scoring: TeacherScoring) -> None:
        while True:
            await asyncio.sleep(self._config.canary_interval_s)
            await scoring.check_canary()

    async def _watch_stalls(self, scoring: TeacherScoring) -> None:
        while True:
            await asyncio.sleep(_STALL_LOOK_S)
            if scoring.stalled_s > self._config.stall_s:
                self._readiness.hold(Part.ENGINE, f"a forward pass takes over stall_s={self._config.stall_s:g}")
            else:
                self._readiness.clear(Part.ENGINE)

    def _run(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._tasks[name] = asyncio.create_task(work, name=name)

    async def _watch(self) -> bool:
        """Until the end is asked for (True) or a background task ends by itself (False)."""
        asked = asyncio.create_task(self._asked.wait())
        done, _ = await asyncio.wait({asked, *self._tasks.values()}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        dead = [task for task in done if task is not asked]
        for task in dead:
            _log.error("the %s task ended", task.get_name(), exc_info=task.exception())
        return not dead

    async def _stop(self) -> bool:
        """In order; True when nothing was cut short."""
        assert self._shutdown is not None
        reason = self._shutdown.signal_name or "a fault"
        self._readiness.hold(Part.SHUTDOWN, f"shutting down after {reason}")
        deadline_s = asyncio.get_running_loop().time() + self._config.drain_s
        is_clean, num_abandoned = await self._finish_work(deadline_s)
        await self._grpc.stop(0.5)
        self._http.stop()
        if "http" in self._tasks:
            await asyncio.wait({self._tasks["http"]}, timeout=2.0)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._scoring is not None and not self.is_engine_busy:
            await self._scoring.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self._scoring is not None:
            _log.info(
                "%s end after %s: %d scored, %d handed back, %d abandoned",
                "clean" if is_clean else "forced",
                reason,
                self._scoring.num_scored,
                self._intake.num_handed_back if self._intake else 0,
                num_abandoned,
            )
        return is_clean

    async def _finish_work(self, deadline_s: float) -> tuple[bool, int]:
        """Hands back, drains, abandons the rest; says whether there was none and how many."""
        loop, is_clean = asyncio.get_running_loop(), True
        if self._intake is not None:
            await self._end("queue")
            is_clean = await self._intake.stop(max(0.0, deadline_s - loop.time()))
        if self._scoring is None:
            return is_clean, 0
        is_drained = await self._scoring.drain(max(0.0, deadline_s - loop.time()))
        num_abandoned = self._scoring.abandon("it is shutting down")
        return is_clean and is_drained and not self.is_engine_busy, num_abandoned

    async def _end(self, name: str) -> None:
        task = self._tasks.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
