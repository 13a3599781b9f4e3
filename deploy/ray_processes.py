"""The Ray processes that this process starts: lists, watches and ends them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil
import ray
from ray._private import ray_constants

VITAL = ("gcs_server", "raylet")
"""If one of them ends, replicas are no longer replaced."""
KILL_TIMEOUT_S = 3.0
NO_DASHBOARD = "127.0.0.1:8265"


class _LeanNode(ray._private.node.Node):  # type: ignore[name-defined, misc]
    """Ray without the processes that nothing here uses."""

    def start_monitor(self) -> None:
        """It starts and stops nodes, of which there is one."""

    def start_log_monitor(self) -> None:
        """It sends the lines of all logs to this process, which shows none."""

    def start_api_server(self, **_: Any) -> None:
        """Ray starts it even without a dashboard, to report usage, which is switched off. This node's agent asks for
        its address until it gets one: that of an API server without dashboard, where nothing listens."""
        self._webui_url = NO_DASHBOARD
        address = (ray_constants.DASHBOARD_ADDRESS.encode(), NO_DASHBOARD.encode())
        self.get_gcs_client().internal_kv_put(*address, True, ray_constants.KV_NAMESPACE_DASHBOARD)


@contextlib.contextmanager
def lean_ray() -> Iterator[None]:
    """Within it, `ray.init` starts a lean Ray; it has no option for that."""
    node: Any = ray._private.node  # type: ignore[attr-defined]
    whole, node.Node = node.Node, _LeanNode
    try:
        yield
    finally:
        node.Node = whole


class RayProcesses:
    """Empty for a cluster that was joined: its processes belong to others."""

    def __init__(self) -> None:
        kinds = ray._private.worker._global_node.all_processes  # type: ignore[attr-defined]
        self._parts = [(kind, info.process) for kind, infos in kinds.items() for info in infos]
        self._seen: set[psutil.Process] = set()

    def ended(self) -> str:
        """The vital process that has ended, by name; empty while all live."""
        return next((kind for kind, process in self._parts if kind in VITAL and process.poll() is not None), "")

    def look(self) -> None:
        """Remember which processes there are: those of a dead raylet can't be found any more."""
        for _, process in self._parts:
            with contextlib.suppress(psutil.NoSuchProcess):
                part = psutil.Process(process.pid)
                self._seen |= {part, *part.children(recursive=True)}

    def kill(self) -> None:
        """End all of them, at once."""
        self.look()
        for _, process in self._parts:  # first, or the raylet would replace its workers
            process.kill()
        for one in list(self._seen):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(self._seen, timeout=KILL_TIMEOUT_S)
