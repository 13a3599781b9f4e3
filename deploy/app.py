"""The Ray Serve application: four deployments, each a service of its own with its own resources.

Serve hosts, places, checks and replaces the replicas, and its handles tell one service where another is. Tokens never
travel through Serve: every replica runs its own gRPC server.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, Protocol

from ray import serve
from ray.serve.handle import DeploymentHandle

from treeline.config import SPIN_COUNT, Config, ResourcesConfig
from treeline.rpc.channels import Discover, reachable_host

APP = "treeline"
DISCOVERY_TIMEOUT_S = 5.0
HEALTH_PERIOD_S = 2.0
SHUTDOWN_GRACE_S = 5.0
MAX_START_ATTEMPTS = 3


class Server(Protocol):
    """What the four services have in common."""

    endpoint: str
    metrics_port: int

    async def check(self) -> None: ...

    async def stop(self, grace_s: float = ...) -> None: ...


class Replica:
    """Runs one server inside a Serve replica."""

    server: Server
    metrics_host: str

    async def endpoint(self) -> str:
        """ "host:port" of this replica's gRPC server."""
        return self.server.endpoint

    async def metrics_target(self) -> str:
        """ "host:port" of this replica's metrics page, as others reach it."""
        return f"{reachable_host(self.metrics_host)}:{self.server.metrics_port}"

    async def process_id(self) -> int:
        """Of the process that this replica runs in, on its node."""
        return os.getpid()

    async def check_health(self) -> None:
        await self.server.check()

    async def __del__(self) -> None:
        if hasattr(self, "server"):  # absent if the constructor failed
            await self.server.stop(SHUTDOWN_GRACE_S)


class PlannerReplica(Replica):
    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]
        from planner.service.server import PlannerServer

        self.metrics_host = (checked := Config.model_validate(config)).metrics.host
        self.server = await PlannerServer.start(checked)


class DrafterReplica(Replica):
    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]
        from drafter_svc.server import DrafterServer

        self.metrics_host = (checked := Config.model_validate(config)).metrics.host
        self.server = await DrafterServer.start(checked)


class VerifierReplica(Replica):
    async def __init__(self, config: dict[str, Any], drafter: DeploymentHandle, planner: DeploymentHandle) -> None:  # type: ignore[misc]
        from verifier_svc.service.server import VerifierServer

        self.metrics_host = (checked := Config.model_validate(config)).metrics.host
        self.server = await VerifierServer.start(checked, drafters(checked, drafter), discover(planner))


class FrontDoorReplica(Replica):
    async def __init__(self, config: dict[str, Any], verifier: DeploymentHandle) -> None:  # type: ignore[misc]
        from front_door.server import FrontDoorServer

        self.metrics_host = (checked := Config.model_validate(config)).metrics.host
        self.front_door = self.server = await FrontDoorServer.start(checked, discover(verifier))

    async def serving_endpoint(self) -> str:
        """ "host:port" of the clients' port, once there is a verifier behind it."""
        await self.front_door.until_serving()
        return self.front_door.endpoint


def discover(handle: DeploymentHandle) -> Discover:
    """Asks all live replicas of a deployment where they listen."""

    async def endpoints() -> list[str]:
        answers = handle.broadcast("endpoint").results_async(return_exceptions=True)
        found = await asyncio.wait_for(answers, DISCOVERY_TIMEOUT_S)
        return [endpoint for endpoint in found if isinstance(endpoint, str)]

    return endpoints


def drafters(config: Config, handle: DeploymentHandle) -> Discover:
    """The drafters that a verifier may use: those that the configuration names, else this application's own."""

    async def named() -> list[str]:
        return config.drafter.endpoints

    return named if config.drafter.endpoints else discover(handle)


def application(config: Config) -> serve.Application:
    """The whole application, ready for `serve.run`."""
    data = config.model_dump(mode="json")
    planner = _deployment(PlannerReplica, "planner", config.planner.resources, threads=1).bind(data)
    drafter_model = config.drafter.model
    drafter_threads = drafter_model.threads if drafter_model else 1
    drafter = _deployment(DrafterReplica, "drafter", config.drafter.resources, drafter_threads).bind(data)
    verifier = _deployment(VerifierReplica, "verifier", config.verifier.resources, config.verifier.target.threads).bind(
        data, drafter, planner
    )
    front_door = _deployment(FrontDoorReplica, "front-door", config.server.resources, threads=1)
    return front_door.options(max_replicas_per_node=1).bind(data, verifier)


def build(args: dict[str, Any]) -> serve.Application:
    """Builder for `serve run deploy.app:build` and Serve config files: `args` are the configuration's sections."""
    return application(Config.model_validate(args))


def _deployment(replica: type[Replica], name: str, resources: ResourcesConfig, threads: int) -> serve.Deployment:
    # Ray would give a replica of less than one CPU a single thread; the verifier is to have all cores by default.
    threads = threads or os.cpu_count() or 1
    openmp = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPIN_COUNT)}
    actor_options: dict[str, Any] = {
        "num_cpus": resources.num_cpus,
        "num_gpus": resources.num_gpus,
        "resources": resources.custom,
        "runtime_env": {"env_vars": openmp},
    }
    if resources.accelerator_type:
        actor_options["accelerator_type"] = resources.accelerator_type
    wrap = serve.deployment(
        name=name,
        num_replicas=resources.replicas,
        ray_actor_options=actor_options,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=SHUTDOWN_GRACE_S + 5,
        max_constructor_retry_count=MAX_START_ATTEMPTS,
    )
    return wrap(replica)
