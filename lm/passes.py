"""How a model's passes are run: padded and captured where that pays, else packed without padding."""

from __future__ import annotations

import logging
import time
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from lm.cpu.native_attention import attention_for
from lm.cuda.graphs import Outputs
from lm.cuda.static_pass import BUCKETS, Body, StaticPasses
from lm.device import upload
from lm.kv_cache import KVCache
from lm.packed import PackedBatch, PackedSequence, pack

logger = logging.getLogger(__name__)

CAPTURE_S = 120.0
"""After so many seconds of a start no further pass is captured ahead of its first use."""


class Passes:
    """Runs one model's passes over any cache.

    Attributes:
        padded: passes are padded to buckets of tokens, and captured on CUDA; the default there. A pass that cannot be
            (too large, odd blocks) is packed, and so are all once one has failed.
    """

    def __init__(self, windows: set[int | None], device: torch.device, states: Tensor | None = None) -> None:
        """As `StaticPasses`."""
        self.padded = device.type == "cuda"
        self._windows, self._device, self._states = windows, device, states
        self._static: WeakKeyDictionary[KVCache, StaticPasses] = WeakKeyDictionary()

    def run(self, body: Body, sequences: list[PackedSequence], cache: KVCache, states: Tensor | None = None) -> Outputs:
        """One pass over all sequences' new tokens: the logits of the wanted ones, then what the body gives by token.

        Raises:
            ValueError: a sequence has no new token, no room for them, or parents that are not a tree.
        """
        batch = pack(sequences)
        outputs = self._run_padded(body, batch, cache, states) if self.padded else None
        if outputs is None:
            columns = (upload(column, self._device) for column in (batch.token_ids, batch.positions, batch.rows))
            token_ids, positions, rows = columns
            outputs = body(token_ids, positions, states, rows, attention_for(batch, cache))
        for sequence in sequences:
            sequence.cache.scratch += len(sequence.token_ids)
        return outputs

    def forget_captured(self) -> None:
        """The body will give something else from now on."""
        self._static.clear()

    @torch.inference_mode()
    def capture(self, body: Body, cache: KVCache) -> None:
        """Capture the passes of every size over an idle cache, small ones first, so that none waits for it later."""
        started_s = time.perf_counter()
        for size in BUCKETS:
            if not self.padded or time.perf_counter() - started_s > CAPTURE_S:
                break
            room = cache.allocate(size)
            if room is None:
                break
            states = None if self._states is None else self._states[:size]
            at_once = np.full(size, -1, np.int32)  # All at position 0, which every model has.
            self.run(body, [PackedSequence(room, [0] * size, at_once)], cache, states)
            cache.free(room)
        if (static := self._static.get(cache)) is not None:
            graphs = static.graphs
            logger.info("captured %d passes, %.0f s, %d MiB", len(graphs), graphs.seconds, graphs.bytes >> 20)

    def _run_padded(self, body: Body, batch: PackedBatch, cache: KVCache, states: Tensor | None) -> Outputs | None:
        if not StaticPasses.serve(cache) or not StaticPasses.fit(batch):
            return None
        try:
            if cache not in self._static:
                self._static[cache] = StaticPasses(cache, self._windows, self._states)
            return self._static[cache].run(body, batch, states)
        except Exception as error:
            if self._device.type != "cuda":
                raise
            # Compiler, driver and memory all fail in their own ways; the packed pass needs none of what failed.
            logger.warning("CUDA graphs are off, passes are packed: %s", " ".join(str(error).split())[:300])
            self.padded = False
            self._static.clear()
            return None
