"""What a teacher tells Prometheus: names, labels and buckets, in a registry of their own.

A process builds one of these objects in its composition root and hands it on; nothing registers itself at import.
Names are `opd_teacher_<what>_<unit>`. Tenants come from callers, so the number of distinct labels is bounded.
"""

import asyncio
import math
import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from opd.errors import known_codes

CONTENT_TYPE = CONTENT_TYPE_LATEST
OTHER_TENANTS = "other"
_MAX_TENANT_LABELS = 100
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKENS = (64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)


class TeacherMetrics:
    """Of one teacher replica."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.score_seconds = Histogram(
            "opd_teacher_score_seconds", "From admission to the answer.", buckets=_SECONDS, registry=registry
        )
        self.queue_age_seconds = Histogram(
            "opd_teacher_queue_age_seconds",
            "From admission (in Redis, for queued requests) to the forward pass.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.engine_seconds = Histogram(
            "opd_teacher_engine_seconds", "One forward pass with its scores.", buckets=_SECONDS, registry=registry
        )
        self.batch_tokens = Histogram(
            "opd_teacher_batch_tokens", "Real tokens in a forward pass.", buckets=_TOKENS, registry=registry
        )
        self.padding_share = Histogram(
            "opd_teacher_padding_share", "Share of padding in a forward pass.", buckets=_SHARES, registry=registry
        )
        self.computed_tokens = Counter(
            "opd_teacher_computed_tokens", "Tokens that went through the model, padding included.", registry=registry
        )
        self.padding_tokens = Counter("opd_teacher_padding_tokens", "Of these, padding.", registry=registry)
        self.reused_prompt_tokens = Counter(
            "opd_teacher_reused_prompt_tokens",
            "Prompt tokens that were not computed, because a sibling's were.",
            registry=registry,
        )
        self._tokens = Counter("opd_teacher_tokens", "Tokens scored.", ["tenant"], registry=registry)
        self.errors = Counter("opd_teacher_errors", "Requests answered with an error.", ["code"], registry=registry)
        for code in known_codes():
            # From 0, so that a rate sees the first of a kind.
            self.errors.labels(code)
        self.in_flight_tokens = Gauge("opd_teacher_in_flight_tokens", "Tokens in the ledger.", registry=registry)
        self.waiting_requests = Gauge("opd_teacher_waiting_requests", "Requests not yet in a batch.", registry=registry)
        self.canary_sound = Gauge(
            "opd_teacher_canary_sound", "1 when the last probe was sound, NaN before the first.", registry=registry
        )
        self.canary_sound.set(math.nan)
        self.ready = Gauge("opd_teacher_ready", "1 when requests are taken.", registry=registry)
        self.loop_lag_seconds = Gauge(
            "opd_teacher_loop_lag_seconds", "How late the event loop last woke.", registry=registry
        )
        self._requests = Counter("opd_teacher_requests", "Requests scored.", ["tenant"], registry=registry)
        self._tenant_seconds = Counter(
            "opd_teacher_tenant_engine_seconds",
            "Engine time, shared by tokens within a batch.",
            ["tenant"],
            registry=registry,
        )
        self.tenants_file_sound = Gauge(
            "opd_teacher_tenants_file_sound", "0 when the tenants file cannot be read.", registry=registry
        )
        self.tenants_file_sound.set(1)
        self._info = Gauge(
            "opd_teacher_info", "1, with what this replica serves.", ["teacher", "fingerprint"], registry=registry
        )
        self._tenants: set[str] = set()
        self._known_tenants: frozenset[str] | None = None

    def render(self) -> bytes:
        """The exposition text, of type `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def know_teacher(self, teacher: str, fingerprint: str) -> None:
        """Once the model is loaded: rules tell replicas of different pools apart by it."""
        self._info.labels(teacher, fingerprint).set(1)

    def know_tenants(self, names: Iterable[str]) -> None:
        """From now on only these have counters of their own; those of tenants that left are dropped."""
        self._known_tenants = frozenset(names)
        for tenant in self._tenants - self._known_tenants - {OTHER_TENANTS}:
            for counter in (self._tokens, self._requests, self._tenant_seconds):
                counter.remove(tenant)
        self._tenants &= self._known_tenants | {OTHER_TENANTS}

    def count_usage(self, tenant: str, *, num_tokens: int, engine_s: float) -> None:
        """Adds a scored request to the tenant's counters, or to those of all others when it is not to be told apart."""
        label = self._label(tenant)
        self._tokens.labels(label).inc(num_tokens)
        self._requests.labels(label).inc()
        self._tenant_seconds.labels(label).inc(engine_s)

    def _label(self, tenant: str) -> str:
        if self._known_tenants is not None:
            is_told = tenant in self._known_tenants
        else:
            is_told = tenant in self._tenants or len(self._tenants) < _MAX_TENANT_LABELS
        label = tenant if is_told else OTHER_TENANTS
        self._tenants.add(label)
        return label


async def watch_loop_lag(gauge: Gauge, interval_s: float = 0.5) -> None:
    """Measures for ever how much later than asked the event loop wakes: what blocking code in it costs everyone."""
    while True:
        due_s = time.monotonic() + interval_s
        await asyncio.sleep(interval_s)
        gauge.set(max(0.0, time.monotonic() - due_s))
