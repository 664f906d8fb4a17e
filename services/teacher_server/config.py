"""Every setting of a teacher replica, checked before anything starts."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from opd.credentials import is_loopback
from opd.settings import Settings
from opd.tracing import TracingSettings


class TlsSettings(Settings):
    """The certificate of a listener; read at the start, so that a new one needs a restart."""

    cert_file: Path | None = None
    """PEM file of the certificate and those between it and the authority; unset serves without TLS."""
    key_file: Path | None = None
    """PEM file of its key."""
    client_ca_file: Path | None = None
    """PEM file of authorities: set, only clients with a certificate of theirs may connect (mutual TLS)."""

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError(f"cert_file={self.cert_file}, key_file={self.key_file}: give both or neither")
        if self.client_ca_file is not None and self.cert_file is None:
            raise ValueError(f"client_ca_file={self.client_ca_file}: needs cert_file and key_file; give them too")
        return self


class GrpcSettings(Settings):
    """The gRPC listener."""

    host: str = "127.0.0.1"
    """Loopback unless told; another address needs tenants_file and grpc.tls, or trust_network."""
    port: int = Field(default=0, ge=0, le=65_535)
    """0 takes a free one, told in the log and the ready file."""
    max_message_bytes: int = Field(default=64 << 20, ge=1024, le=1 << 30)
    """Of a request or an answer; published in GetInfo."""
    max_concurrent_rpcs: int = Field(default=1024, ge=1)
    """Beyond it callers are told to come back; probes of health are not among them."""
    keepalive_time_s: float = Field(default=60.0, gt=0)
    """A silent connection is probed after this long."""
    keepalive_timeout_s: float = Field(default=20.0, gt=0)
    """A probed connection is closed after this long without an answer."""
    max_connection_age_s: float = Field(default=600.0, gt=0)
    """Connections are renewed, so that callers find new replicas."""
    max_connection_age_grace_s: float = Field(default=300.0, gt=0)
    """What an ageing connection's last calls are given."""
    tls: TlsSettings = TlsSettings()
    """See TlsSettings."""


class HttpSettings(Settings):
    """The HTTP listener: health, metrics, and scoring for looking by hand."""

    host: str = "127.0.0.1"
    """Loopback unless told; another address needs tenants_file and http.tls, or trust_network."""
    port: int = Field(default=0, ge=0, le=65_535)
    """0 takes a free one."""
    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    """Of /v1/score."""
    tls: TlsSettings = TlsSettings()
    """See TlsSettings; with client_ca_file, probes of /healthz need a certificate too."""
    metrics_token_file: Path | None = None
    """/metrics wants this bearer token; without one it is open on loopback and where there is no tenants_file, and
    shut elsewhere, since it names tenants and what they use."""


class BatchingSettings(Settings):
    """How requests share the engine; tokens are prompt plus response."""

    max_batch_tokens: int = Field(default=16_384, ge=1)
    """Tokens of one forward pass, padding included; a longer single request has one of its own."""
    max_batch_requests: int = Field(default=256, ge=1)
    """Requests dealt to the engine at once."""
    max_direct_tokens: int = Field(default=131_072, ge=1)
    """In-flight tokens of all gRPC and HTTP callers together."""
    max_tenant_tokens: int = Field(default=65_536, ge=1)
    """In-flight tokens of one tenant over gRPC and HTTP, where the tenants file says nothing else."""
    quantum_tokens: int = Field(default=1_024, ge=1)
    """What a tenant of weight 1 is granted in a turn."""
    max_padding_share: float = Field(default=0.1, ge=0, lt=1)
    """Of a forward pass."""
    prefix_cache_tokens: int = Field(default=16_384, ge=0)
    """Tokens of prompts whose keys and values are kept for later rollouts of the same prompt; 0 keeps none."""
    row_chunk: int = Field(default=256, ge=1)
    """Response rows that go through the output head at a time."""
    linger_ms: float = Field(default=2.0, ge=0, le=1000)
    """How long an idle engine waits for company to the first request."""


class HiddenStatesSettings(Settings):
    """Hidden states and the output head over gRPC: together they hand out part of the model."""

    enabled: bool = False
    """Off unless told: a right of its own beside scoring."""
    chunk_bytes: int = Field(default=1 << 20, ge=1024, le=1 << 25)
    """Of one message of ScoreStream or GetOutputHead; a single row may be longer."""


class QueueSettings(Settings):
    """How the replica takes from Redis."""

    batches_ahead: float = Field(default=2.0, ge=1, le=4)
    """Tokens held here, in batches: one being scored, one ready. Newcomers' first requests may add one more."""
    lease_s: float = Field(default=30.0, ge=0.2)
    """After this long without a sign of life other replicas take over what this one holds."""
    max_deliveries: int = Field(default=3, ge=1)
    """A request that took down so many replicas is put aside."""
    patience_s: float = Field(default=60.0, gt=0)
    """How long an answer waits for a lost Redis; then its lease runs out and another replica scores it again."""
    announce_s: float = Field(default=2.0, gt=0)
    """Between two signs of life; two missed ones make the replica not ready."""
    per_fingerprint: bool = False
    """Serves the pool name@fingerprint, to be switched to with `opd pool promote`, instead of the bare name."""
    user: str = ""
    """Redis user of this pool where redis_url names none; its password is OPD_REDIS_PASSWORD or its file."""
    ca_file: Path | None = None
    """For rediss://: PEM file of the authorities that may have signed Redis's certificate."""
    cert_file: Path | None = None
    """For rediss://: PEM file of a certificate of our own."""
    key_file: Path | None = None
    """PEM file of its key."""

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError(f"cert_file={self.cert_file}, key_file={self.key_file}: give both or neither")
        return self


class VllmSettings(Settings):
    """What is passed on to vLLM; read where engine is vllm."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share the weights."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory for weights, keys and values."""
    kv_cache_bytes: int = Field(default=0, ge=0)
    """Of keys and values; 0 is what gpu_memory_utilization leaves, and 1 GiB without a GPU."""
    quantization: str | None = None
    """How vLLM quantises the weights while it loads them, such as fp8; weights that are stored quantised need none."""
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    """Of a forward pass; a longer sequence is computed in pieces. A pass holds logits for so many rows at most."""
    enforce_eager: bool = False
    """Neither compilation nor CUDA graphs: slower passes, ready sooner."""
    batch_invariant: bool = False
    """vLLM's batch-invariant kernels (some GPUs only, slower): the replica then takes batch_invariant requests."""


class TeacherConfig(Settings):
    """One teacher replica."""

    model: str
    """Folder or hub name of a causal language model with safetensors and tokenizer."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What computes; vllm wants the Python of .venv-vllm (scripts/setup_vllm.sh)."""
    teacher: str = "teacher"
    """The pool's name; [a-z0-9-]{1,63}."""
    device: str = "auto"
    """auto, cpu or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto is bfloat16 on CUDA and float32 elsewhere; normalisers are float32 always."""
    max_context: int = Field(default=0, ge=0)
    """Prompt plus response tokens of a request; 0 is the model's own limit."""
    max_candidates: int = Field(default=256, ge=1, le=65_536)
    """Candidate ids a position."""
    max_score_top_k: int = Field(default=256, ge=1, le=65_536)
    """The teacher's own top-k."""
    redis_url: str | None = None
    """redis://, rediss:// or unix:// URL of the queue; unset takes OPD_REDIS_URL or its file, and serves gRPC and HTTP
    only if there is none."""
    grpc: GrpcSettings = GrpcSettings()
    """See GrpcSettings."""
    http: HttpSettings = HttpSettings()
    """See HttpSettings."""
    batching: BatchingSettings = BatchingSettings()
    """See BatchingSettings."""
    queue: QueueSettings = QueueSettings()
    """See QueueSettings."""
    hidden_states: HiddenStatesSettings = HiddenStatesSettings()
    """See HiddenStatesSettings."""
    tenants_file: Path | None = None
    """TOML file of `opd tenants`: tokens, weights, caps and rights, followed while running. Unset lets everybody in
    and leaves the queue's limits as they are."""
    trust_network: bool = False
    """The network is private: listeners may leave loopback without tokens, and with tokens without TLS; the password of
    Redis may travel without TLS too."""
    vllm: VllmSettings = VllmSettings()
    """See VllmSettings."""
    replica: str = ""
    """This replica's name in replies and metrics; unset is host name and process id."""
    canary_interval_s: float = Field(default=60.0, gt=0)
    """Between two runs of the probe."""
    stall_s: float = Field(default=300.0, gt=0)
    """A forward pass longer than this makes the replica not ready and lets its leases go."""
    torch_threads: int = Field(default=0, ge=0)
    """0 is one fewer than the cores this process may use, at least one."""
    drain_s: float = Field(default=30.0, ge=0)
    """What is being scored at SIGTERM has this long to finish."""
    cache_folder: Path | None = Path("~/.cache/opd")
    """Where the weights' hash is remembered."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Of everything on standard error."""
    log_json: bool = False
    """One JSON object a line."""
    log_requests: bool = False
    """One line for each request that was answered."""
    tracing: TracingSettings = TracingSettings()
    """Of requests whose trainer traces them; see TracingSettings."""

    @field_validator("teacher")
    @classmethod
    def _teacher_is_a_name(cls, teacher: str) -> str:
        if not re.fullmatch(r"[a-z0-9-]{1,63}", teacher):
            raise ValueError("names are [a-z0-9-]{1,63}")
        return teacher

    @model_validator(mode="after")
    def _caps_fit(self) -> Self:
        batching = self.batching
        if batching.max_tenant_tokens > batching.max_direct_tokens:
            raise ValueError(
                f"batching.max_tenant_tokens={batching.max_tenant_tokens}: is over batching.max_direct_tokens="
                f"{batching.max_direct_tokens}; lower the first or raise the second"
            )
        if self.hidden_states.enabled and self.engine == "vllm":
            raise ValueError("hidden_states.enabled=true: engine=vllm does not supply them; use engine=transformers")
        if self.hidden_states.enabled and self.hidden_states.chunk_bytes > self.grpc.max_message_bytes // 2:
            raise ValueError(
                f"hidden_states.chunk_bytes={self.hidden_states.chunk_bytes}: is over half of grpc.max_message_bytes="
                f"{self.grpc.max_message_bytes}; lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _listeners_are_safe(self) -> Self:
        for name, listener in (("grpc", self.grpc), ("http", self.http)):
            if is_loopback(listener.host) or self.trust_network:
                continue
            if self.tenants_file is None:
                raise ValueError(
                    f"{name}.host={listener.host}: would serve everybody; set tenants_file, or trust_network=true "
                    "where the network is private"
                )
            if listener.tls.cert_file is None:
                raise ValueError(
                    f"{name}.host={listener.host}: tokens would travel in clear text; set {name}.tls.cert_file and "
                    f"{name}.tls.key_file, or trust_network=true where the network is private"
                )
        return self
