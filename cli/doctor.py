"""`treeline doctor`: is this machine fit to serve, and with what."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import grpc
import typer

import treeline
from cli.options import ConfigFile
from treeline.config import Config, ServerConfig
from treeline.config_file import load_config
from treeline.rpc.channels import family_of
from treeline.rpc.tokens import read_tokens
from treeline.v1 import generation_pb2 as pb
from treeline.v1.generation_pb2_grpc import GenerationServiceStub

PACKAGES = ("torch", "transformers", "ray", "grpcio", "protobuf", "numpy", "scipy", "prometheus-client", "gguf")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
CACHE_BYTES_NEEDED = 2e9
ANSWER_S = 2.0
"""Time-out for a running service's answer: it takes milliseconds; another program on its port would never answer."""


def doctor(config: ConfigFile = None) -> None:
    """Show versions, processor, GPUs, model cache and ports; exit 1 if something needed is missing."""
    checked = load_config(config)
    findings = list(examine(checked))
    for fine, subject, finding in findings:
        typer.echo(f"{'ok  ' if fine else 'FAIL'}  {subject:<17} {finding}")
    if not all(fine for fine, _, _ in findings):
        raise typer.Exit(1)


def examine(config: Config) -> Iterator[tuple[bool, str, str]]:
    """(is it fine, subject, what was found) for each thing that serving needs."""
    yield True, "treeline", f"{treeline.__version__} on Python {platform.python_version()}, {platform.platform()}"
    for package in PACKAGES:
        try:
            yield True, package, version(package)
        except PackageNotFoundError:
            yield False, package, "not installed: pip install treeline-serve"
    yield True, "cpu", f"{os.cpu_count()} cores; {', '.join(_cpu_flags()) or 'no vector extensions that matter'}"
    yield _kernels()
    yield _gpus()
    yield _models()
    load, user = _running(config.server)
    yield _port("server.port", config.server.host, config.server.port, user)
    if config.server.http.enabled:
        yield _port("server.http.port", config.server.host, config.server.http.port, user)
    if load is not None:
        drafter = load.drafter_problem or ("ready" if load.drafter_ready else "away")
        yield not load.drafter_problem, "drafter", drafter
    if config.planner.prometheus_url:
        yield asyncio.run(_prometheus(config.planner.prometheus_url))


def _running(server: ServerConfig) -> tuple[pb.GetLoadResponse | None, str]:
    """The load reported by the service that runs here, if any, and who uses its ports, if known."""
    if server.tls is not None:
        return None, "this service, if it runs (with TLS it is not asked)"
    metadata = (("authorization", f"Bearer {read_tokens(server.token_file)[0]}"),) if server.token_file else ()
    with grpc.insecure_channel(f"{server.host}:{server.port}") as channel:
        try:
            asked = GenerationServiceStub(channel).GetLoad(pb.GetLoadRequest(), timeout=ANSWER_S, metadata=metadata)
        except grpc.RpcError as error:
            return None, "this service" if error.code() == grpc.StatusCode.UNAUTHENTICATED else ""
    return asked, "this service"


def _cpu_flags() -> list[str]:
    try:
        known = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [flag for flag in CPU_FLAGS if flag in known]


def _kernels() -> tuple[bool, str, str]:
    try:
        from lm.cpu.grouped_linear import kernel_for
    except ImportError:
        return True, "kernels", "unknown without torch"
    kernel = kernel_for("auto")
    if kernel is None:
        return True, "kernels", "torch's own: ours need a C compiler at installation, and AVX2"
    return True, "kernels", f"compiled; weights in groups: {kernel.arithmetic} by {kernel.instructions}"


def _gpus() -> tuple[bool, str, str]:
    try:
        import torch
    except ImportError:
        return True, "gpu", "unknown without torch"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not names:
        return True, "gpu", "none; the CPU serves"
    missing = ["the package triton"] if find_spec("triton") is None else []
    missing += [] if shutil.which("gcc") or shutil.which("clang") or os.environ.get("CC") else ["a C compiler"]
    finding = f"; without {' and '.join(missing)} all passes are packed, which is slow" if missing else ""
    return not missing, "gpu", ", ".join(names) + finding


def _models() -> tuple[bool, str, str]:
    try:
        from lm.store import cache_folder, cached_models
    except ImportError:
        return True, "models", "unknown without transformers"
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    names = ", ".join(path.name for path in cached_models()) or "none yet"
    space = f"{free_bytes / 1e9:.0f} GB free, {CACHE_BYTES_NEEDED / 1e9:.0f} needed"
    return free_bytes > CACHE_BYTES_NEEDED, "models", f"{names} in {folder} ({space})"


async def _prometheus(url: str) -> tuple[bool, str, str]:
    from planner.service.latency import PrometheusError, measure_all  # slow to import, and rarely needed

    try:
        measured = await measure_all(url)
    except PrometheusError as error:
        return False, "prometheus", str(error)
    if not measured:
        return True, "prometheus", f"{url} answers, but has nothing of any verifier (deploy/prometheus has its rules)"
    return True, "prometheus", f"{url} measures {', '.join(sorted(measured))}"


def _port(setting: str, host: str, port: int, user: str) -> tuple[bool, str, str]:
    with socket.socket(family_of(host)) as probe:
        probe.settimeout(0.5)
        taken = port != 0 and probe.connect_ex((host, port)) == 0
    if not taken:
        return True, setting, f"{host}:{port} is free"
    if user:
        return True, setting, f"{host}:{port} is in use by {user}"
    return False, setting, f"{host}:{port} is in use, and no Treeline answers: end what does, or set another {setting}"
