"""CUDA graphs: a pass is recorded once for each shape and replayed afterwards, without Python and without launches.

As torch's documentation has it: a few runs on a stream of their own, the capture, then replays. The graphs share their
memory, so whatever one of them gives is to be copied before another one is replayed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

WARM_UP_RUNS = 2
SPARE_BYTES = 1 << 30
"""With less free memory on the device nothing more is captured."""

Outputs = tuple[Tensor, ...]


class Graphs:
    """Captured runs by key.

    Attributes:
        seconds: spent on capturing so far, compilation included.
        bytes: of device memory taken by it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        if device.type == "cuda":
            # One stream, since graphs share memory only if they were captured on the same one.
            self._pool, self._aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self.seconds = 0.0
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable, body: Callable[[], Outputs]) -> Outputs:
        """What `body` gives: run as it is on the CPU and where memory is short, else captured at the key's first use.

        `body` works on tensors that stay where they are, gives the same when it is run again, and never waits.
        """
        if self._device.type != "cuda":
            return body()
        if key not in self._captured:
            if torch.cuda.mem_get_info(self._device)[0] < SPARE_BYTES:
                return body()
            self._captured[key] = self._capture(body)
        graph, outputs = self._captured[key]
        graph.replay()
        return outputs

    def _capture(self, body: Callable[[], Outputs]) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        started_s, free_bytes = time.perf_counter(), torch.cuda.mem_get_info(self._device)[0]
        aside, current = self._aside, torch.cuda.current_stream(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_RUNS):
                body()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
            outputs = body()
        self.seconds += time.perf_counter() - started_s
        self.bytes += max(0, free_bytes - torch.cuda.mem_get_info(self._device)[0])
        return graph, outputs
