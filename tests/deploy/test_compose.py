"""The Compose files, the images and the example configurations fit together."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.app import Replica
from lm.cuda.layout import BUCKETS
from planner.policies import parse_policy
from treeline.config import Config
from treeline.config_file import load_config

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
GPU_FILE = ROOT / "deploy/compose.gpu.yml"
GPU = yaml.safe_load(GPU_FILE.read_text())["services"]["treeline"]
EXAMPLES = sorted((ROOT / "deploy/config").glob("*.yaml"))
CONFIG = load_config(ROOT / "deploy/config/compose.yaml")
CHECKER = shutil.which("check-jsonschema", path=Path(sys.executable).parent)


def mounts(service: str) -> dict[str, str]:
    """Source by path in the container."""
    split = [volume.split(":") for volume in SERVICES[service]["volumes"]]
    return {path: source for source, path, *_ in split}


@pytest.mark.skipif(not CHECKER, reason="needs check-jsonschema")
def test_the_files_follow_the_compose_specification():
    command = [CHECKER, "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml", GPU_FILE]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_every_service_is_watched_bounded_and_pinned():
    assert SERVICES.keys() == {"treeline", "prometheus", "grafana"}
    for name, service in SERVICES.items():
        assert ("healthcheck" in service) == (name != "treeline"), "our image has its own"
        assert service["deploy"]["resources"]["limits"].keys() == {"memory", "pids"}, name
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+(-cpu)?", service["image"]), name
        assert set(service.get("depends_on", [])) <= SERVICES.keys(), name


def test_ports_are_published_on_loopback_only():
    published = {name: service["ports"] for name, service in SERVICES.items()}
    for port in (port for ports in published.values() for port in ports):
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)
    ports = (CONFIG.server.port, CONFIG.server.http.port)
    assert published["treeline"] == [f"127.0.0.1:{port}:{port}" for port in ports]


def test_mounted_files_exist_and_volumes_are_declared():
    for name in SERVICES:
        for source in mounts(name).values():
            assert (ROOT / source).exists() if source.startswith("./") else source in COMPOSE["volumes"], source


def test_the_gpu_file_changes_the_image_the_configuration_and_the_devices_only():
    assert GPU.keys() == {"image", "build", "volumes", "deploy"}
    assert GPU["build"] == {"args": {"DEVICE": "cuda"}}
    (mount,) = GPU["volumes"]
    source, path, _ = mount.split(":")
    config = load_config(ROOT / source)
    assert path in mounts("treeline")
    assert (config.server, config.metrics) == (CONFIG.server, CONFIG.metrics)
    devices = GPU["deploy"]["resources"]["reservations"]["devices"]
    assert sum(part.resources.num_gpus for part in (config.verifier, config.drafter)) == devices[0]["count"]


def test_the_services_find_each_other():
    assert mounts("treeline")["/etc/treeline/config.yaml"] == "./deploy/config/compose.yaml"
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["http_sd_configs"][0]["url"] == f"http://treeline:{CONFIG.server.http.port}/targets"
    provisioning = ROOT / mounts("grafana")["/etc/grafana/provisioning"]
    source = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((provisioning / "dashboards/treeline.yml").read_text())["providers"][0]
    dashboards = ROOT / mounts("grafana")[provider["options"]["path"]]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (dashboards / home.name).is_file()


def test_the_build_context_holds_every_package():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert kept == packages | {"LICENSE", "README.md", "pyproject.toml", "requirements.lock", "setup.py"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_right(path):
    config = load_config(path)
    parse_policy(config.verifier.default_policy)
    limits = config.limits
    for tokens in (config.verifier.kv_cache_tokens, config.drafter.kv_cache_tokens):
        assert tokens >= limits.max_context_tokens + limits.max_tree_nodes
    assert config.drafter.max_sessions >= limits.max_running_requests


DEVICE_GB = {"B200": 180, "H200": 141, "H100": 80, "A100": 80, "L40S": 48, "L4": 24}
MODELS = {
    "Qwen/Qwen3-0.6B": (1.2, 28 * 2 * 8 * 128 * 2),
    "Qwen/Qwen3-8B": (16.4, 36 * 2 * 8 * 128 * 2),
    "meta-llama/Llama-3.1-8B-Instruct": (16.1, 32 * 2 * 8 * 128 * 2),
    "meta-llama/Llama-3.3-70B-Instruct": (141.1, 80 * 2 * 8 * 128 * 2),
}
"""GB of weights in bfloat16, and bytes of KV a token."""
SPARE_GB = 6
"""A process needs beside weights and KV: CUDA's context, captured passes, logits and sampling of 512 rows."""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_fit_their_devices(path):
    examples_fit(load_config(path))


def examples_fit(config: Config) -> None:
    """Weights, KV cache and what a process needs besides fit the devices that the configuration asks for."""
    used: dict[str, float] = {}
    for part, model in ((config.verifier, config.verifier.target), (config.drafter, config.drafter.model)):
        if part.resources.num_gpus and model is not None:
            weights_gb, token_bytes = MODELS[model.model]
            ranks = model.tensor_parallel
            assert part.kv_cache_tokens != "auto" or part.resources.num_gpus == 1
            tokens = config.limits.max_context_tokens if part.kv_cache_tokens == "auto" else part.kv_cache_tokens
            needed = (weights_gb + tokens * token_bytes / 1e9) / ranks + SPARE_GB
            shared = part.resources.num_gpus < 1
            accelerator = part.resources.accelerator_type or "L40S"  # deploy/compose.gpu.yml asks for 48 GB
            device = f"{accelerator}{'' if shared else part}"
            used[device] = used.get(device, 0) + needed
            assert used[device] <= DEVICE_GB[accelerator], f"{part} needs {used[device]:.0f} GB"
    if config.verifier.resources.num_gpus:
        assert config.verifier.prefill_chunk_tokens <= BUCKETS[-1], "full chunks would be packed"


def test_the_cluster_example_uses_two_classes_of_gpus():
    config = load_config(ROOT / "deploy/config/cluster.yaml")
    classes = [config.verifier.resources.accelerator_type, config.drafter.resources.accelerator_type]
    assert None not in classes
    assert len(set(classes)) == 2
    assert config.server.tls
    assert config.server.token_file
    assert config.internal.token_file


def test_pages_on_all_interfaces_are_listed_by_an_address_that_others_reach():
    replica = Replica()
    replica.server = type("Server", (), {"metrics_port": 9400})()
    for host, listed in (("127.0.0.1", r"127\.0\.0\.1:9400"), ("0.0.0.0", r"(?!0\.0\.0\.0)\d+\.\d+\.\d+\.\d+:9400")):
        replica.metrics_host = host
        assert re.fullmatch(listed, asyncio.run(replica.metrics_target()))
