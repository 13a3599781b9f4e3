"""CUDA graphs: a pass is captured once for each shape and replayed afterwards, without Python or separate launches.

As torch's documentation advises: a few warm-up runs on a side stream, the capture, then replays. The graphs share
their memory, so the outputs of one must be copied before another one is replayed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from typing import Literal, get_args

import torch
from torch import Tensor

from lm.store import one_line

logger = logging.getLogger(__name__)

WARM_UP_RUNS = 2
SPARE_BYTES = 1 << 30
"""Nothing is captured while less memory of the device is free: prompts and sampling need it."""
RETRY_S = 60.0
"""A size whose capture failed is tried again at its first use after this time."""

Outputs = tuple[Tensor, ...]
How = Literal["replayed", "native", "eager", "packed"]
"""How a pass ran. "replayed": as a captured graph. "native": without padding, the only way on a CPU. "eager": padded,
its operations launched one by one. "packed": without padding on a device that captures; about ten times slower."""
WAYS: tuple[How, ...] = get_args(How)
"""The slowest one last."""


class Graphs:
    """Captured runs by key.

    Attributes:
        strict: a capture that fails is an error.
        seconds: spent on capturing so far, compilation included.
        bytes: device memory taken by it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self._not_before_s: dict[Hashable, float] = {}
        self._shared: dict[tuple[int, ...], Tensor] = {}
        if device.type == "cuda":
            # One stream, since graphs share memory only if they were captured on the same one.
            self._pool, self._aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self.strict = False
        self.seconds = 0.0
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable, body: Callable[[], Outputs]) -> tuple[Outputs, How]:
        """Outputs of `body`: replayed if it could be captured, now or earlier, else run as it is.

        `body` works on tensors at fixed addresses, gives the same when run again, and never synchronises.
        """
        if key not in self._captured and self._device.type == "cuda":
            self._try_capture(key, body)
        if key not in self._captured:
            return body(), "eager"
        graph, outputs = self._captured[key]
        graph.replay()
        return outputs, "replayed"

    def _try_capture(self, key: Hashable, body: Callable[[], Outputs]) -> None:
        if time.monotonic() < self._not_before_s.get(key, 0.0):
            return
        try:
            free_bytes = torch.cuda.mem_get_info(self._device)[0]
            if free_bytes < SPARE_BYTES:
                raise torch.OutOfMemoryError(f"{free_bytes >> 20} MiB of the device are free")
            self._captured[key] = self._capture(body)
        except RuntimeError as error:  # OutOfMemoryError is one.
            if self.strict:
                raise
            self._not_before_s[key] = time.monotonic() + RETRY_S
            logger.warning("a pass of size %s is not captured, next try in %.0f s: %s", key, RETRY_S, one_line(error))
            torch.cuda.empty_cache()

    def _capture(self, body: Callable[[], Outputs]) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        started_s, free_bytes = time.perf_counter(), torch.cuda.mem_get_info(self._device)[0]
        aside, current = self._aside, torch.cuda.current_stream(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_RUNS):
                outputs = body()
            shared = self._shared_for(outputs)
            del outputs
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
            for place, output in zip(shared, body(), strict=True):
                place.copy_(output)
        self.seconds += time.perf_counter() - started_s
        self.bytes += max(0, free_bytes - torch.cuda.mem_get_info(self._device)[0])
        return graph, shared

    def _shared_for(self, outputs: Outputs) -> Outputs:
        """Output buffers shared by all graphs, so that small sizes take no memory besides that of large ones."""
        places = []
        for index, output in enumerate(outputs):
            key = (index, *output.shape[1:])
            if key not in self._shared or len(self._shared[key]) < len(output):
                self._shared[key] = torch.empty_like(output)
            places.append(self._shared[key][: len(output)])
        return tuple(places)
