"""A Ray cluster of several nodes on this machine, the service deployed on it with `serve deploy`, and its clients."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster

from tests.verifier_svc.services import save_tiny_model, tiny_config
from treeline.client import TreelineClient
from treeline.errors import TreelineError, UnavailableError
from treeline.v1 import generation_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "deploy/serve.yaml"
SLOTS = 14
"""Of a verifier: one of two verifiers goes while no more than 0.6 of them are taken, which 8 streams do."""
STREAMS, BURST = 8, 24
WAIT_S = 120
PROMPT, TOKENS = "one two three, one two three, one two", 200
FAST = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}
DEATH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
"""A lost node is noticed within 2 s."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Deployed:
    """The service on a cluster whose nodes offer the custom resources that place its replicas."""

    def __init__(self, cluster: Cluster, folder: Path, target: Path, dashboard_port: int) -> None:
        self.cluster, self._folder, self._dashboard_port = cluster, folder, dashboard_port
        self.port, self.http_port = free_port(), free_port()
        self._config = tiny_config(target, max_running_requests=SLOTS).model_dump(mode="json")
        verifier = self._config["verifier"]
        verifier["resources"] |= {
            "num_cpus": 0,
            "custom": {"verifiers": 1},
            "replicas": {"min": 1, "max": 2, "up_after_s": 0, "down_after_s": 2},
        }
        for section, place in (("drafter", "base"), ("planner", "base"), ("server", "doors")):
            self._config[section]["resources"] |= {"num_cpus": 0, "custom": {place: 1}}
        self._config["server"] |= {"port": self.port, "http": {"port": self.http_port}}

    def deploy(self, section: str = "verifier", **settings: Any) -> None:
        """`serve deploy` of the shipped example with this configuration, some settings of a section changed."""
        self._config[section] |= settings
        example = yaml.safe_load(EXAMPLE.read_text())
        for application in example["applications"]:
            application["args"] = {section: self._config[section] for section in application["args"]}
            if application["name"] == "treeline-drafter":  # of the verifier it reads the target alone
                application["args"]["verifier"] = {"target": self._config["verifier"]["target"]}
            if application["name"] == "treeline-front-door":
                application["args"]["verifier"] = {"resources": self._config["verifier"]["resources"]}
        path = self._folder / "serve.yaml"
        path.write_text(yaml.safe_dump(example))
        command = [str(Path(sys.executable).parent / "serve"), "deploy"]
        command += ["--address", f"http://127.0.0.1:{self._dashboard_port}", str(path)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)

    def scale(self, section: str, replicas: int | dict[str, int], **settings: Any) -> None:
        """`deploy` with so many replicas, or a range of them."""
        self.deploy(section, resources=self._config[section]["resources"] | {"replicas": replicas}, **settings)

    @property
    def target(self) -> dict[str, Any]:
        """The verifiers' model."""
        return self._config["verifier"]["target"]

    def replicas(self, service: str) -> list[int]:
        """The process ids of a service's replicas."""
        handle = serve.get_deployment_handle(service, f"treeline-{service}")
        return sorted(handle.broadcast("process_id").results(timeout_s=10))

    def verifiers(self) -> int:
        """Verifiers that the front door can reach."""
        from urllib.request import urlopen

        with urlopen(f"http://127.0.0.1:{self.http_port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return int(float(next(x.split()[1] for x in lines if x.startswith("treeline_front_door_verifiers "))))

    def drafter_sessions(self) -> list[int]:
        """How many requests each drafter drafts for."""
        from urllib.request import urlopen

        targets = serve.get_deployment_handle("drafter", "treeline-drafter").broadcast("metrics_target")
        pages = [urlopen(f"http://{target}/metrics", timeout=5) for target in targets.results(timeout_s=10)]
        lines = [line for page in pages for line in page.read().decode().splitlines()]
        return [int(float(line.split()[1])) for line in lines if line.startswith("treeline_drafter_sessions ")]

    def lose_node_of(self, pid: int) -> None:
        """End the raylet, without a warning, of the node that a replica's process runs on."""
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        for node in list(self.cluster.worker_nodes):
            if any(info.process.pid == parent for info in node.all_processes["raylet"]):
                self.cluster.remove_node(node, allow_graceful=False)
                return
        raise LookupError(f"no node runs process {pid}")

    def add_node(self, **resources: int) -> None:
        self.cluster.add_node(num_cpus=1, resources=resources, object_store_memory=80 << 20)


def until(condition: Callable[[], bool], what: str) -> float:
    """Wait until `condition()`; a call that fails counts as not yet. Returns the seconds it took."""
    begun_s = time.monotonic()
    problem = None
    while time.monotonic() - begun_s < WAIT_S:
        try:
            if condition():
                return time.monotonic() - begun_s
            problem = None
        except Exception as error:
            problem = error
        time.sleep(0.2)
    raise AssertionError(f"not within {WAIT_S} s: {what} ({problem!r})")


class Streams:
    """Clients that stream the same answer over and over, and count what comes out."""

    def __init__(self, port: int, expected: str, policy: str | None = None) -> None:
        self._client, self._expected, self._policy = TreelineClient(f"127.0.0.1:{port}"), expected, policy
        self.whole, self.refused, self.problems = 0, 0, list[str]()
        self._most = 0
        self._threads: list[threading.Thread] = []

    def run(self, streams: int) -> None:
        """From now on so many at a time; those beyond end with the answer that they stream now."""
        self._most = streams
        for place in range(len(self._threads), streams):
            thread = threading.Thread(target=self._stream, args=(place,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        self._most = 0
        for thread in self._threads:
            thread.join(WAIT_S)
        self._threads.clear()

    def go_on(self) -> float:
        """Wait until every stream that runs now has ended once more. Returns the seconds it took."""
        whole = self.whole
        return until(lambda: self.whole >= whole + self._most or bool(self.problems), "answers")

    def _stream(self, place: int) -> None:
        while place < self._most:
            text = ""
            try:
                for longer in growing(self._client, self._policy):
                    text = longer
            except TreelineError as error:
                if text or not isinstance(error, UnavailableError):
                    self.problems.append(f"{error!r} behind {text[-80:]!r}")
                self.refused += 1  # no verifier is there to begin with
                time.sleep(0.5)
                continue
            if text == self._expected:
                self.whole += 1
            else:
                self.problems.append(f"another text: {text[:80]}")
        self._threads = [thread for thread in self._threads if thread is not threading.current_thread()]


def growing(client: TreelineClient, policy: str | None = None) -> Iterator[str]:
    """The text so far, with each chunk."""
    text = ""
    for chunk in client.generate(PROMPT, max_tokens=TOKENS, policy=policy, timeout_s=WAIT_S):
        if isinstance(chunk, pb.GenerateChunk):
            text += chunk.text
            yield text


@contextmanager
def deployed(folder: Path) -> Iterator[Deployed]:
    """Three nodes: the head, and two others that each have room for a verifier."""
    before = {name: os.environ.get(name) for name in FAST}
    os.environ.update(FAST)
    dashboard_port = free_port()
    head = {
        "num_cpus": 2,
        "resources": {"base": 3, "doors": 1},
        "include_dashboard": True,
        "dashboard_port": dashboard_port,
        "_system_config": DEATH,
        "object_store_memory": 80 << 20,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    try:
        service = Deployed(cluster, folder, save_tiny_model(folder / "target"), dashboard_port)
        service.add_node(verifiers=1)
        service.add_node(verifiers=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", namespace="serve")
        service.deploy()
        until(lambda: service.verifiers() == 1, "a verifier behind the front door")
        yield service
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
