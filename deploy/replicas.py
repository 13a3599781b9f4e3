"""The four services inside Serve replicas, and how they find each other."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import ray.util
from ray import serve
from ray.serve._private.logging_utils import get_serve_logs_dir
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from treeline.config import LOOPBACK, SPIN_COUNT, Config
from treeline.rpc.channels import OWN_ADDRESS, Discover, freeze_started, reachable_host
from treeline.telemetry import logs, tracing

logger = logging.getLogger(__name__)

DISCOVERY_TIMEOUT_S = 5.0
SHUTDOWN_GRACE_S = 5.0


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
    _asked_from = ""

    def configured(self, config: dict[str, Any]) -> Config:
        """The checked configuration. Call it before anything imports torch, which then reads OpenMP's settings.

        Sets up logging. Servers on all interfaces announce Ray's address of this node.
        """
        os.environ.setdefault(OWN_ADDRESS, ray.util.get_node_ip_address())
        checked = Config.model_validate(config)
        self.metrics_host = checked.metrics.host
        service = serve.get_replica_context().deployment
        os.environ |= openmp(service, checked)
        logs.configure(checked.logging, service, Path(get_serve_logs_dir()))
        tracing.configure(checked.tracing, service)
        return checked

    async def endpoint(self, asked_from: str) -> str:
        """ "host:port" of this replica's gRPC server. `asked_from`: Ray's address of the asking node."""
        self._asked_from = asked_from
        return self.server.endpoint

    async def metrics_target(self) -> str:
        """ "host:port" of this replica's metrics page, as others reach it."""
        return f"{reachable_host(self.metrics_host)}:{self.server.metrics_port}"

    async def process_id(self) -> int:
        """Id of this replica's process, on its node."""
        return os.getpid()

    async def check_health(self) -> None:
        if problem := unreachable(self.server.endpoint, self._asked_from, ray.util.get_node_ip_address()):
            raise RuntimeError(problem)
        await self.server.check()

    async def __del__(self) -> None:
        if hasattr(self, "server"):  # absent if the constructor failed
            await self.server.stop(SHUTDOWN_GRACE_S)


class PlannerReplica(Replica):
    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]
        checked = self.configured(config)
        with importing():
            from planner.service.server import PlannerServer

        self.server = await PlannerServer.start(checked)
        freeze_started()


class DrafterReplica(Replica):
    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]
        checked = self.configured(config)
        with importing():
            from drafter_svc.server import DrafterServer

        self.drafter = self.server = await DrafterServer.start(checked)
        freeze_started()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return self.drafter.stats()


class VerifierReplica(Replica):
    async def __init__(self, config: dict[str, Any], drafter: DeploymentHandle, planner: DeploymentHandle) -> None:  # type: ignore[misc]
        checked = self.configured(config)
        with importing():
            from verifier_svc.service.profile_cache import keep_profiles
            from verifier_svc.service.server import VerifierServer

        for profiles in await known_profiles(_equals()):
            keep_profiles(profiles)
        rank = str(serve.get_replica_context().rank.rank)
        self.verifier = self.server = await VerifierServer.start(
            checked, drafters(checked, drafter), discover(planner), rank
        )
        freeze_started()

    async def profiles(self) -> dict[str, str]:
        """The device profiles of this node, by file name: a new verifier on an equal device need not measure."""
        from verifier_svc.service.profile_cache import stored_profiles

        return stored_profiles()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return self.verifier.stats()


class FrontDoorReplica(Replica):
    async def __init__(self, config: dict[str, Any], services: dict[str, DeploymentHandle]) -> None:  # type: ignore[misc]
        checked = self.configured(config)
        with importing():
            from front_door.server import FrontDoorServer

        services = {**services, "front-door": _equals()}

        async def pages() -> dict[str, list[str]]:
            answers = await asyncio.gather(*(_ask_all(handle, "metrics_target") for handle in services.values()))
            return {service: found for service, (found, _) in zip(services, answers, strict=True)}

        self.front_door = self.server = await FrontDoorServer.start(checked, discover(services["verifier"]), pages)
        freeze_started()

    async def serving_endpoint(self) -> str:
        """ "host:port" of the clients' port, once there is a verifier behind it."""
        await self.front_door.until_serving()
        return self.front_door.endpoint

    async def http_port(self) -> int:
        """0 if HTTP is not enabled."""
        return self.front_door.http.port if self.front_door.http else 0


@contextmanager
def importing() -> Iterator[None]:
    """Pause garbage collection while modules are imported, and exempt them from it: there is no garbage to find, and a
    collection takes longer the more is loaded."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def openmp(service: str, config: Config) -> dict[str, str]:
    """OpenMP's settings in the environment of a replica. Ray's default is one thread for less than one CPU."""
    model = {"verifier": config.verifier.target, "drafter": config.drafter.model}.get(service)
    threads = 1 if model is None else model.threads or os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPIN_COUNT)}


async def known_profiles(verifiers: DeploymentHandle) -> list[dict[str, str]]:
    """Device profiles that running verifiers have measured. Without an answer in time a device is measured again."""
    try:
        found, silent = await _ask_all(verifiers, "profiles")
    except TimeoutError:
        found, silent = [], True
    if silent:
        logger.warning("not all other verifiers sent their device profiles within %g s", DISCOVERY_TIMEOUT_S)
    return found


def discover(handle: DeploymentHandle) -> Discover:
    """Asks all live replicas of a deployment where they listen. While one does not answer, the known ones stay."""
    known: set[str] = set()

    async def endpoints() -> list[str]:
        nonlocal known
        found, silent = await _ask_all(handle, "endpoint", ray.util.get_node_ip_address())
        known = {*found, *(known if silent else ())}
        return list(known)

    return endpoints


def drafters(config: Config, handle: DeploymentHandle) -> Discover:
    """The drafters that a verifier may use: those that the configuration names, else this application's own."""

    async def named() -> list[str]:
        return config.drafter.endpoints

    return named if config.drafter.endpoints else discover(handle)


def unreachable(endpoint: str, asked_from: str, own_address: str) -> str:
    """Why a peer that asked from another node cannot reach `endpoint`; empty if it can, as far as is known."""
    if not asked_from or asked_from == own_address or endpoint.rpartition(":")[0].strip("[]") not in LOOPBACK:
        return ""
    return f"{endpoint} cannot be reached from {asked_from}: set internal.host to 0.0.0.0 or an address of this network"


def _equals() -> DeploymentHandle:
    """The deployment that this replica belongs to."""
    context = serve.get_replica_context()
    return serve.get_deployment_handle(context.deployment, context.app_name)


async def _ask_all(handle: DeploymentHandle, method: str, *arguments: str) -> tuple[list[Any], int]:
    """The answers of all running replicas, and how many gave none within DISCOVERY_TIMEOUT_S. Failures are left out.

    Raises:
        TimeoutError: Serve did not say which replicas there are.
    """
    try:
        # `results_async` waits for the slowest: a replica that hangs would hide all others.
        asking = handle.broadcast(method, *arguments)._fetch_replica_results_async()
        asked = await asyncio.wait_for(asking, DISCOVERY_TIMEOUT_S)
    except DeploymentUnavailableError:  # none runs
        return [], 0
    answers = [asyncio.ensure_future(replica.get_async()) for replica in asked]
    answered, silent = await asyncio.wait(answers, timeout=DISCOVERY_TIMEOUT_S)
    for answer in silent:
        answer.cancel()
    found = await asyncio.gather(*answered, return_exceptions=True)
    return [answer for answer in found if not isinstance(answer, BaseException)], len(silent)
