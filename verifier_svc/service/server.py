"""The verifier service: model, engine, link to the drafter, plan, reports, metrics and gRPC port, put together."""

from __future__ import annotations

import asyncio
import logging
import uuid
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health

from lm.model import LanguageModel
from lm.parallel import load_model
from lm.store import vocabulary_sha256
from planner.service.client import PlanWatcher, StepReporter
from treeline.config import Config
from treeline.errors import ConfigError
from treeline.metrics import VerifierMetrics
from treeline.plan import VerifierProfile
from treeline.rpc.channels import (
    Discover,
    add_standard_services,
    bind,
    keep_freed_memory,
    new_server,
    reachable_host,
)
from treeline.rpc.interceptors import SERVICE, CallInterceptor
from treeline.step_record import StepRecord
from treeline.telemetry.page import labelled, new_registry, serve_metrics
from treeline.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from verifier_svc.engine.engine import Engine
from verifier_svc.engine.request import Chunk, Completion
from verifier_svc.service.async_engine import AsyncEngine
from verifier_svc.service.chat import tool_call_format
from verifier_svc.service.fields import ServedModel
from verifier_svc.service.profile import warm_up
from verifier_svc.service.profile_cache import verification_profile
from verifier_svc.service.service import GenerationServicer
from verifier_svc.service.speedup import Speedup
from verifier_svc.speculation.link import RemoteLink, wait_for_info

logger = logging.getLogger(__name__)

DRAFTER_WAIT_S = 3.0
"""Wait for a drafter that starts at the same time, whose costs belong to the profile. It may also connect later."""
LOAD_INTERVAL_S = 0.5
"""Between updates of the load's gauges: twice per scrape of 1 s."""
LOADER = "loader"
"""The thread that loads and measures, and then ends. Every computing thread keeps an OpenMP pool of its own; once the
pools' threads, idle ones included, outnumber the cores, OpenMP lets all of them sleep at every barrier of a pass."""


class VerifierServer:
    """One verifier.

    Attributes:
        endpoint: "host:port" of its generation service, for front doors.
        metrics_port: port of /metrics.
    """

    def __init__(
        self,
        endpoint: str,
        metrics_port: int,
        server: grpc.aio.Server,
        health_servicer: health.aio.HealthServicer,
        engine: AsyncEngine,
        link: RemoteLink,
        watcher: PlanWatcher,
        reporter: StepReporter,
        load_task: asyncio.Task[None],
    ) -> None:
        self.endpoint, self.metrics_port = endpoint, metrics_port
        self._server, self._health, self._engine = server, health_servicer, engine
        self._link, self._watcher, self._reporter, self._load_task = link, watcher, reporter, load_task

    @classmethod
    async def start(cls, config: Config, drafter: Discover, planner: Discover, replica: str = "0") -> VerifierServer:
        """Load the model, profile the device and listen. `replica`: its name in metrics, which outlives restarts.

        Raises:
            ConfigError: the model cannot be served as configured, or a port is taken.
        """
        loop, verifier_id = asyncio.get_running_loop(), uuid.uuid4().hex
        registry = new_registry()
        metrics = VerifierMetrics(registry)
        with ThreadPoolExecutor(1, LOADER) as loader:
            model = await loop.run_in_executor(loader, load_model, config.verifier.target)
            _check_limits(model, config)
            watcher = PlanWatcher(planner, verifier_id, config.limits, config.internal, metrics.refused_plans.inc)
            link = RemoteLink(drafter, config, model.vocab_size, vocabulary_sha256(model.tokenizer))
            if model.passes.padded:
                await wait_for_info(link, DRAFTER_WAIT_S)  # Its features are captured with the passes.
            core = await loop.run_in_executor(loader, Engine, model, link, lambda: watcher.plan, config)
            curves = await loop.run_in_executor(loader, verification_profile, model, core.cache)
            await loop.run_in_executor(loader, warm_up, model, core.cache)
        info = await wait_for_info(link, DRAFTER_WAIT_S)
        profile = VerifierProfile(curves, info.layer_s if info else 0.0, info.node_s if info else 0.0)
        page = labelled(registry, model_name=model.name, replica=replica)
        metrics_port = serve_metrics(page, config.metrics)
        metrics_url = f"http://{reachable_host(config.metrics.host)}:{metrics_port}/metrics"
        reporter = StepReporter(planner, verifier_id, metrics_url, profile, config.internal)

        speedup = Speedup()

        def on_step(record: StepRecord) -> None:
            metrics.observe_step(record)
            if watcher.plan.version:  # the built-in plan knows no costs of this device
                metrics.set_speedup(speedup.observe(record, watcher.plan.cost))
            reporter.report(record)

        limits = config.limits
        engine = AsyncEngine(
            core,
            limits.max_running_requests,
            limits.max_waiting_requests,
            on_step,
            lambda output: _observe_output(metrics, output),
        )
        server = new_server(config.internal, limits.max_message_bytes, interceptors=[CallInterceptor()])
        servicer = GenerationServicer(
            engine, model.tokenizer, served(model, config), limits, config.verifier, lambda: watcher.plan
        )
        add_GenerationServiceServicer_to_server(servicer, server)
        health_servicer = await add_standard_services(server, SERVICE)
        endpoint = bind(server, config.internal)
        await server.start()
        keep_freed_memory()  # After loading, which would otherwise leave holes.
        load_task = asyncio.create_task(_show_load(engine, metrics), name="verifier-load")
        logger.info("verifier of %s at %s, metrics at %s", model.name, endpoint, metrics_url)
        return cls(endpoint, metrics_port, server, health_servicer, engine, link, watcher, reporter, load_task)

    async def check(self) -> None:
        """Raise RuntimeError if this verifier can no longer serve."""
        self._engine.check()

    def stats(self) -> dict[str, float]:
        """For the autoscaler: requests with and without a slot, the slots, and whether an objective is missed now."""
        load, signals = self._engine.load(), self._watcher.plan.signals
        late = any(s.objective_s and s.value_s and s.value_s > s.objective_s for s in signals)
        return {
            "running": load.num_requests_running,
            "waiting": self._engine.queued,
            "slots": self._engine.max_running,
            "late": float(late),
        }

    async def stop(self, grace_s: float = 5) -> None:
        """Say NOT_SERVING, refuse new requests, let running ones end within `grace_s`, free everything."""
        await self._health.enter_graceful_shutdown()
        await self._engine.stop(grace_s)
        await self._server.stop(1.0)
        self._load_task.cancel()
        self._link.close()
        await self._watcher.close()
        await self._reporter.close()


def _check_limits(model: LanguageModel, config: Config) -> None:
    if config.limits.max_context_tokens > model.max_context_tokens:
        raise ConfigError(
            f"limits.max_context_tokens is {config.limits.max_context_tokens}, "
            f"but {model.name} supports {model.max_context_tokens}"
        )


def served(model: LanguageModel, config: Config) -> ServedModel:
    return ServedModel(
        name=model.name,
        architecture=model.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=model.vocab_size,
        max_context_tokens=config.limits.max_context_tokens,
        eos_token_ids=model.eos_token_ids,
        has_chat_template=model.tokenizer.chat_template is not None,
        tool_call_format=tool_call_format(model.tokenizer.chat_template),
        sampling=config.verifier.sampling_defaults.over(model.sampling),
    )


def _observe_output(metrics: VerifierMetrics, output: Chunk | Completion) -> None:
    if isinstance(output, Completion):
        metrics.observe_prefix(output.prompt_tokens, output.cached_tokens)
        metrics.observe_finished(
            output.finish_reason,
            output.prompt_tokens,
            output.completion_tokens,
            output.queue_s,
            output.time_to_first_token_s,
            output.total_s,
            output.speculation.mean_accepted_length,
            output.target_met,
        )
    elif output.first:
        metrics.observe_first_token(output.waited_s)
    else:
        metrics.observe_tokens(len(output.token_ids), output.waited_s)


async def _show_load(engine: AsyncEngine, metrics: VerifierMetrics) -> None:
    while True:
        load = engine.load()
        metrics.set_load(
            load.num_requests_running,
            load.num_requests_waiting,
            load.kv_blocks_used,
            load.kv_blocks_total,
            load.drafter_ready,
            bool(load.drafter_problem),
        )
        await asyncio.sleep(LOAD_INTERVAL_S)
