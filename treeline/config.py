"""Configuration of a whole deployment: one YAML file, every field with a sane default.

`treeline config` prints the defaults; `treeline/config_file.py` reads a file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from treeline.request import MAX_PRIORITY
from treeline.sampling import SamplingParams

DEFAULT_MODEL = "default"
"""Stands for the embedded default model (see `lm/store.py`)."""
SPIN_COUNT = "30000"
"""`GOMP_SPINCOUNT` of every process that runs a model, unless the environment sets one: how long idle OpenMP threads
keep their core. About a millisecond bridges two matrix products, but does not starve another process."""

MAX_RUNNING_REQUESTS, MAX_TREE_NODES, MAX_TREE_DEPTH = 1024, 256, 32
"""Upper bounds of `limits`. They also bound the numbers in messages between services, and array sizes."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ResourcesConfig(Section):
    """What Ray reserves for one replica, and how many there are."""

    num_cpus: float = Field(default=0.5, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    accelerator_type: str | None = None
    custom: dict[str, float] = Field(
        default={}, description="custom Ray resources: they put a replica on the nodes that offer them"
    )
    replicas: int = Field(default=1, ge=1)

    @property
    def most_replicas(self) -> int:
        return self.replicas


class ReplicaRange(Section):
    """The load decides how many replicas there are."""

    min: int = Field(default=1, ge=1)
    max: int = Field(ge=1)
    up_after_s: float = Field(default=5.0, ge=0, description="how long more replicas are wanted before they start")
    down_after_s: float = Field(default=120.0, ge=0, description="how long fewer are wanted before one drains")

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaRange:
        if self.max < self.min:
            raise ValueError(f"max is {self.max}, but min is {self.min}")
        return self


class ScaledResourcesConfig(ResourcesConfig):
    replicas: Annotated[int, Field(ge=1)] | ReplicaRange = 1  # type: ignore[assignment]

    @property
    def most_replicas(self) -> int:
        return self.replicas.max if isinstance(self.replicas, ReplicaRange) else self.replicas


BlockTokens = Annotated[int, Field(ge=1, le=256)] | Literal["auto"]
CacheTokens = Annotated[int, Field(ge=64)] | Literal["auto"]
Quantization = Literal["auto", "none", "int8", "int4", "fp8"]
Arithmetic = Literal["auto", "float32", "int8"]


class ModelConfig(Section):
    """A language model: "default", a Hugging Face id, a folder, or a .gguf file."""

    model: str = DEFAULT_MODEL
    name: str | None = Field(default=None, description="name under which it is served; the model's own by default")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="auto: float32 on the CPU for weights that come in bfloat16 or in groups, which stay as small as "
        "they come; else bfloat16 where the device is fast with it, else float32",
    )
    quantization: Quantization = Field(
        default="auto",
        description="auto: float32 weights that come in groups of 4 or 8 bits (GGUF) stay so, and lose nothing; int8, "
        "int4: all are rounded to such, and the rounded model is the target; on the CPU. fp8: the same with 8-bit "
        "floating-point numbers, inputs too; on GPUs since the L4 and H100",
    )
    arithmetic: Arithmetic = Field(
        default="auto",
        description="of weights in groups. int8: each 32 inputs of a token are rounded to 8 bits, and the model that "
        "computes so is the target; float32: as transformers does; auto: int8 where this processor has a kernel",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cuda_graphs: Literal["auto", "require"] = Field(
        default="auto",
        description="require: a start fails unless all passes are captured as CUDA graphs, those of its draft head too",
    )
    threads: int = Field(default=0, ge=0, description="CPU threads; 0 leaves it to torch")
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        le=8,
        description="devices of one machine that share the target; its replica needs as many GPUs",
    )


class LimitsConfig(Section):
    """Nothing is unbounded."""

    max_running_requests: int = Field(default=16, ge=1, le=MAX_RUNNING_REQUESTS)
    max_waiting_requests: int = Field(default=64, ge=0)
    max_context_tokens: int = Field(default=2048, ge=16, description="prompt and output together")
    max_output_tokens: int = Field(default=1024, ge=1)
    max_tree_nodes: int = Field(default=64, ge=0, le=MAX_TREE_NODES, description="per request and step")
    max_tree_depth: int = Field(default=8, ge=0, le=MAX_TREE_DEPTH)
    max_stop_strings: int = Field(default=16, ge=0)
    max_stop_string_chars: int = Field(default=256, ge=1)
    max_logprobs: int = Field(default=20, ge=0)
    max_message_bytes: int = Field(default=4 << 20, ge=1 << 16)


class SamplingDefaults(Section):
    """Unset fields of a request's sampling take these; where they are null, what the model's generation_config.json
    says."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)

    def over(self, model: SamplingParams) -> SamplingParams:
        """The model's defaults, overridden by these."""
        return replace(model, **self.model_dump(exclude_none=True))


class VerifierConfig(Section):
    target: ModelConfig = ModelConfig()
    resources: ScaledResourcesConfig = ScaledResourcesConfig(num_cpus=1)
    kv_cache_tokens: CacheTokens = Field(default=16384, description="auto: what the device has room for")
    kv_block_tokens: BlockTokens = Field(default="auto", description="auto: 128 on CUDA, else 16")
    prefill_chunk_tokens: int = Field(default=256, ge=16, description="most prompt tokens in one step")
    prefix_caching: bool = Field(default=True, description="reuse the KV of prompts that begin alike")
    draft_timeout_s: float = Field(default=1.0, gt=0)
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    default_policy: str = "smart"
    allowed_policies: list[str] = Field(
        default=["off", "chain:", "static:", "eagle2:", "smart-paper", "smart"],
        description='what requests may ask for; an entry ending in ":" admits any parameters',
    )

    @model_validator(mode="after")
    def _a_device_each(self) -> VerifierConfig:
        wanted = self.target.tensor_parallel
        if wanted > 1 and self.target.device == "cuda" and self.resources.num_gpus != wanted:
            raise ValueError(f"target.tensor_parallel: {wanted} needs resources.num_gpus: {wanted}")
        return self


class DrafterConfig(Section):
    kind: Literal["auto", "ngram", "model", "model+ngram", "head", "head+ngram"] = Field(
        default="auto",
        description="ngram: drafts are looked up in the request's own text, alone or beside a model or head; "
        "auto: head+ngram if there is a head for the target, else ngram",
    )
    model: ModelConfig | None = Field(default=None, description="the draft model; needs the target's vocabulary")
    head: Path | str | None = Field(
        default=None, description="an EAGLE-3 draft head for the target: a folder or a Hugging Face id"
    )
    head_layers: list[int] | None = Field(
        default=None,
        description="behind how many of the target's layers the head reads, where its config.json is wrong about it",
    )
    endpoints: list[str] = Field(
        default=[], description="host:port of drafters outside this application, used in place of its own"
    )
    resources: ScaledResourcesConfig = ScaledResourcesConfig(num_cpus=0.5)
    max_sessions: int = Field(default=256, ge=1)
    kv_cache_tokens: CacheTokens = 16384

    @property
    def looks_up(self) -> bool:
        """Whether prompt lookup drafts for texts that repeat themselves."""
        return self.kind == "auto" or "ngram" in self.kind

    @model_validator(mode="after")
    def _model_given(self) -> DrafterConfig:
        if "model" in self.kind and self.model is None:
            raise ValueError(f"kind '{self.kind}' needs a draft model: set drafter.model.model")
        if self.model is not None and self.model.tensor_parallel > 1:
            raise ValueError("model.tensor_parallel: a draft model stays on one device")
        return self


class ObjectivesConfig(Section):
    """Latency that the planner holds where plain decoding can; without them it maximises tokens per second."""

    inter_token_p95_ms: float | None = Field(default=None, gt=0, description="95th percentile between tokens")
    time_to_first_token_p95_ms: float | None = Field(default=None, gt=0, description="95th percentile from arrival")


class PlannerConfig(Section):
    resources: ResourcesConfig = ResourcesConfig(num_cpus=0.1)
    interval_s: float = Field(default=0.25, gt=0)
    plan_lifetime_s: float = Field(default=10.0, gt=0)
    objectives: ObjectivesConfig = ObjectivesConfig()
    objectives_by_priority: dict[Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)], ObjectivesConfig] = Field(
        default={}, description="of the requests of these priorities alone, beside those of all requests"
    )
    prometheus_url: str | None = Field(
        default=None, description="query API that measures latency; without it step records do"
    )
    signal_max_age_s: float = Field(default=10.0, gt=0, description="older measurements of latency control nothing")


class TlsConfig(Section):
    certificate: Path
    private_key: Path


class HttpConfig(Section):
    """The OpenAI-compatible HTTP port, on the same host as the gRPC port, with the same TLS and tokens."""

    enabled: bool = True
    port: int = Field(default=8000, ge=0, le=65535, description="0 takes any free port")


class ServerConfig(Section):
    """The clients' ports."""

    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    tls: TlsConfig | None = None
    token_file: Path | None = Field(
        default=None, description="a bearer token a line, with quotas behind it (docs/operations.md)"
    )
    allow_insecure: bool = Field(default=False, description="admit a non-loopback host without TLS or tokens")
    http: HttpConfig = HttpConfig()
    resume_wait_s: float = Field(
        default=60.0, ge=0, description="how long a stream that lost its verifier waits for another one"
    )
    resources: ResourcesConfig = ResourcesConfig(num_cpus=0.1)

    @property
    def page(self) -> str:
        """URL of the page for browsers; empty without HTTP, or if the port is chosen at the start."""
        if not (self.http.enabled and self.http.port):
            return ""
        return f"http{'s' if self.tls else ''}://{self.host}:{self.http.port}"

    @model_validator(mode="after")
    def _secure(self) -> ServerConfig:
        if self.host not in LOOPBACK and not self.allow_insecure and (self.tls is None or self.token_file is None):
            raise ValueError(
                f"host {self.host} leaves the machine: set server.tls and server.token_file, or server.allow_insecure"
            )
        return self


class MetricsConfig(Section):
    """Each replica serves /metrics on its own port: base_port plus its place among this node's replicas."""

    host: str = "127.0.0.1"
    base_port: int = Field(default=9400, ge=0, le=65535, description="0 takes any free port")
    prometheus: Literal["none", "auto"] = Field(
        default="none",
        description="auto: `treeline serve` starts the prometheus on PATH, if there is one, and the planner reads it",
    )
    token_file: Path | None = Field(default=None, description="who reads a page shows one of these bearer tokens")


class LoggingConfig(Section):
    """Of all services, each into a file of its own in the folder of Ray Serve's logs."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"
    prompts: bool = Field(default=False, description="access lines hold the prompts")


class TracingConfig(Section):
    """OpenTelemetry traces of requests, off by default."""

    endpoint: str | None = Field(
        default=None, description='OTLP/gRPC collector, "http://host:4317"; needs the extra `tracing`'
    )


class InternalConfig(Section):
    """Ports between the services. On one machine they stay on loopback."""

    host: str = "127.0.0.1"
    token_file: Path | None = Field(default=None, description="shared secret the services show each other")
    tls: TlsConfig | None = None

    @model_validator(mode="after")
    def _secure(self) -> InternalConfig:
        if self.host not in LOOPBACK and self.token_file is None:
            raise ValueError(f"host {self.host} leaves the machine: set internal.token_file")
        return self


class Config(Section):
    server: ServerConfig = ServerConfig()
    verifier: VerifierConfig = VerifierConfig()
    drafter: DrafterConfig = DrafterConfig()
    planner: PlannerConfig = PlannerConfig()
    limits: LimitsConfig = LimitsConfig()
    metrics: MetricsConfig = MetricsConfig()
    logging: LoggingConfig = LoggingConfig()
    tracing: TracingConfig = TracingConfig()
    internal: InternalConfig = InternalConfig()

    def with_absolute_paths(self) -> Config:
        """The same configuration for a process in another folder: existing files and models get absolute paths."""
        return Config.model_validate(_absolute(self.model_dump()))


def _absolute(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _absolute(item, key) for key, item in value.items()}
    if isinstance(value, Path):
        return value.absolute()
    if name in ("model", "head") and value is not None and Path(value).exists():  # else the id of a model
        return str(Path(value).absolute())
    return value
