"""The Ray Serve application: four deployments, each a service of its own with its own resources.

Serve hosts, places, checks, scales and replaces the replicas, and its handles tell one service where another is. Tokens
never travel through Serve: every replica runs its own gRPC server.

`build` makes one application of the four. `planner`, `drafter`, `verifier` and `front_door` make one each: Serve
restarts a whole application when its arguments change, so a changed setting restarts only the services that take it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from deploy.autoscaling import scaling
from deploy.replicas import (
    SHUTDOWN_GRACE_S,
    DrafterReplica,
    FrontDoorReplica,
    PlannerReplica,
    Replica,
    VerifierReplica,
)
from treeline.config import Config, ReplicaRange, ResourcesConfig

APP = "treeline"
HEALTH_PERIOD_S = 2.0
MAX_START_ATTEMPTS = 3

Found = DeploymentHandle | serve.Application
"""Another service: of this application, or by name."""


def application(config: Config) -> serve.Application:
    """The whole application, ready for `serve.run`."""
    # Serve starts them in this order. The verifier takes longest: it gets a process that Ray has started ahead.
    verifier = _verifier(config, DeploymentHandle("drafter", APP), DeploymentHandle("planner", APP))
    return _front_door(config, {"verifier": verifier, "drafter": _drafter(config), "planner": _planner(config)})


def build(args: dict[str, Any]) -> serve.Application:
    """Builder for Serve config files and `serve run deploy.app:build`: `args` are the configuration's sections."""
    return application(Config.model_validate(args))


def planner(args: dict[str, Any]) -> serve.Application:
    """The application treeline-planner; takes the sections planner, limits, metrics and internal."""
    return _planner(Config.model_validate(args))


def drafter(args: dict[str, Any]) -> serve.Application:
    """The application treeline-drafter; takes verifier.target, drafter, limits, metrics and internal."""
    return _drafter(Config.model_validate(args))


def verifier(args: dict[str, Any]) -> serve.Application:
    """The application treeline-verifier; takes verifier, drafter.kind, limits, metrics and internal."""
    return _verifier(Config.model_validate(args), _elsewhere("drafter"), _elsewhere("planner"))


def front_door(args: dict[str, Any]) -> serve.Application:
    """The application treeline-front-door; takes server, verifier.resources.replicas, limits, metrics and internal."""
    services = {name: _elsewhere(name) for name in ("planner", "drafter", "verifier")}
    return _front_door(Config.model_validate(args), services)


def _elsewhere(service: str) -> DeploymentHandle:
    return DeploymentHandle(service, f"{APP}-{service}")


def _planner(config: Config) -> serve.Application:
    return _deployment(PlannerReplica, "planner", config.planner.resources).bind(config.model_dump(mode="json"))


def _drafter(config: Config) -> serve.Application:
    resources = config.drafter.resources
    deployment = _deployment(DrafterReplica, "drafter", resources, resources.replicas)
    return deployment.bind(config.model_dump(mode="json"))


def _verifier(config: Config, drafter: Found, planner: Found) -> serve.Application:
    resources = config.verifier.resources
    deployment = _deployment(VerifierReplica, "verifier", resources, resources.replicas)
    return deployment.bind(config.model_dump(mode="json"), drafter, planner)


def _front_door(config: Config, services: Mapping[str, Found]) -> serve.Application:
    resources = config.server.resources
    deployment = _deployment(FrontDoorReplica, "front-door", resources, resources.replicas)
    return deployment.options(max_replicas_per_node=1).bind(config.model_dump(mode="json"), dict(services))


def _deployment(
    replica: type[Replica], name: str, resources: ResourcesConfig, replicas: int | ReplicaRange = 1
) -> serve.Deployment:
    # No `runtime_env`: with one, Ray could not use a process that it has started ahead.
    actor_options: dict[str, Any] = {
        "num_cpus": resources.num_cpus,
        "num_gpus": resources.num_gpus,
        "resources": resources.custom,
    }
    if resources.accelerator_type:
        actor_options["accelerator_type"] = resources.accelerator_type
    count: dict[str, Any] = {"num_replicas": replicas}
    if isinstance(replicas, ReplicaRange):
        count = {"autoscaling_config": scaling(replicas, policy=f"{name}s")}
    wrap = serve.deployment(
        name=name,
        ray_actor_options=actor_options,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=SHUTDOWN_GRACE_S + 5,
        max_constructor_retry_count=MAX_START_ATTEMPTS,
        logging_config={"enable_access_log": False},  # of calls by handle: each service asks the others each second
        **count,
    )
    return wrap(replica)
