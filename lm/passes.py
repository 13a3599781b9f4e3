"""How a model's passes are run: padded and captured on CUDA, else packed without padding."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from lm.cpu.native_attention import attention_for
from lm.cuda.graphs import WAYS, How, Outputs
from lm.cuda.layout import BUCKETS, MOST_SEQUENCES, row_counts
from lm.cuda.static_pass import Body, StaticPasses
from lm.device import upload
from lm.kv_cache import KVCache
from lm.packed import PackedBatch, PackedSequence, pack
from lm.store import one_line
from treeline.errors import ConfigError

logger = logging.getLogger(__name__)

CAPTURE_S = 120.0
"""After this many seconds of startup no further pass is captured before its first use."""


class Passes:
    """Runs one model's passes over any cache.

    Attributes:
        padded: passes are padded to buckets of tokens, and captured on CUDA; the default there. Too many sequences run
            as several passes. A sequence with too many new tokens runs packed, and so do all passes once the padded
            pass failed to compile.
        required: a pass that can't be captured at startup is an error.
        announce: called with ("pass", sequences, cache) before each pass, and with ("forget",), for other ranks.
        in_lockstep: other ranks follow, so a pass that fails is an error and has no fallback.
        how: how the last pass ran; if it was split into several, the slowest way.
        largest: int64 [rows], the token of the largest logit of each row of the last pass; None if it was not padded.
        counts: number of passes so far, by how they ran.
    """

    def __init__(
        self, windows: set[int | None], device: torch.device, states: Tensor | None = None, required: bool = False
    ) -> None:
        """As `StaticPasses`."""
        self.padded, self.required = device.type == "cuda", required
        self.announce: Callable[..., None] | None = None
        self.in_lockstep = False
        self.how: How = "native"
        self.largest: Tensor | None = None
        self.counts: Counter[How] = Counter()
        self._unpadded: How = "packed" if self.padded else "native"
        self._windows, self._device, self._states = windows, device, states
        self._static: WeakKeyDictionary[KVCache, StaticPasses] = WeakKeyDictionary()

    @property
    def most_tokens(self) -> int:
        """Most new tokens of one sequence before its pass runs in a slower way."""
        return BUCKETS[-1] if self.padded else sys.maxsize

    @property
    def slow(self) -> int:
        """How many passes ran in a slower way than this device allows."""
        return self.counts["eager"] + self.counts["packed"]

    def run(self, body: Body, sequences: list[PackedSequence], cache: KVCache, states: Tensor | None = None) -> Outputs:
        """One pass over all sequences' new tokens: logits of the wanted ones, then the body's outputs per token.

        Raises:
            ValueError: a sequence has no new token, no room for them, or parents that are not a tree.
        """
        if self.announce is not None:
            self.announce("pass", sequences, cache)
        parts, largest, ways, first = [], [], [], 0
        for group in _groups(sequences) if self.padded else [sequences]:
            stop = first + sum(len(sequence.token_ids) for sequence in group)
            parts.append(self._run_group(body, group, cache, None if states is None else states[first:stop]))
            largest.append(self.largest)
            ways.append(self.how)
            first = stop
        self.how = max(ways, key=WAYS.index)
        if len(parts) > 1:
            told = [ids for ids in largest if ids is not None]
            self.largest = torch.cat(told) if len(told) == len(parts) else None
        return parts[0] if len(parts) == 1 else tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))

    def forget_captured(self) -> None:
        """Drop captured passes: the body's outputs change."""
        if self.announce is not None:
            self.announce("forget")
        if any(len(static.graphs) for static in self._static.values()):
            logger.warning("captured passes are dropped: each size is captured again at its next use")
        self._static.clear()

    @torch.inference_mode()
    def capture(self, body: Body, cache: KVCache) -> None:
        """Capture the passes of every size over an idle cache, so that none waits for capture later.

        Large ones come first, so that small ones reuse their memory.

        Raises:
            ConfigError: captured passes are required, and one could not be captured.
        """
        started_s = time.perf_counter()
        sizes = [(size, rows) for size in reversed(BUCKETS) for rows in row_counts(size)]
        for size, rows in sizes if self.padded else ():
            late = time.perf_counter() - started_s > CAPTURE_S
            room = None if late else cache.allocate(size)
            if room is None:
                continue
            states = None if self._states is None else self._states[:size]
            at_once = np.full(size, -1, np.int32)  # All at position 0, which every model has.
            self.run(
                body, [PackedSequence(room, [0] * size, at_once, "all" if rows == size else "last")], cache, states
            )
            cache.free(room)
        static = self._static.get(cache)
        captured = 0 if static is None else len(static.graphs)
        if static is not None:
            spent = f"{static.graphs.seconds:.0f} s, {static.graphs.bytes >> 20} MiB"
            logger.info("captured %d of %d passes, %s", captured, len(sizes), spent)
        if self.required and captured < len(sizes):
            raise ConfigError(f"cuda_graphs: require, but only {captured} of {len(sizes)} passes were captured")

    def _run_group(self, body: Body, sequences: list[PackedSequence], cache: KVCache, states: Tensor | None) -> Outputs:
        batch = pack(sequences)
        outputs = self._run_padded(body, batch, cache, states) if self.padded else None
        if outputs is None:
            columns = (upload(column, self._device) for column in (batch.token_ids, batch.positions, batch.rows))
            token_ids, positions, rows = columns
            outputs = body(token_ids, positions, states, rows, attention_for(batch, cache))
            self.largest, self.how = None, self._unpadded
        self.counts[self.how] += 1
        for sequence in sequences:
            sequence.cache.scratch += len(sequence.token_ids)
        return outputs

    def _run_padded(self, body: Body, batch: PackedBatch, cache: KVCache, states: Tensor | None) -> Outputs | None:
        if not StaticPasses.fit(batch):
            return None
        try:
            if cache not in self._static:
                self._static[cache] = StaticPasses(cache, self._windows, self._states)
                self._static[cache].graphs.strict = self.in_lockstep
            outputs, self.largest, self.how = self._static[cache].run(body, batch, states)
            return outputs
        except torch.OutOfMemoryError as error:
            if self.in_lockstep:
                raise
            logger.warning("a pass of %d tokens is packed: %s", len(batch.token_ids), one_line(error))
            torch.cuda.empty_cache()
        except Exception as error:
            if self._device.type != "cuda" or self.required or self.in_lockstep:
                raise
            # It failed without capture: kernels do not compile or are wrong. The packed pass needs none of them.
            logger.warning("CUDA graphs are off, all passes are packed: %s", one_line(error))
            self.padded = False
            self._static.clear()
        return None


def _groups(sequences: list[PackedSequence]) -> list[list[PackedSequence]]:
    """The sequences in order, in groups that fit one padded pass."""
    groups: list[list[PackedSequence]] = [[]]
    tokens = 0
    for sequence in sequences:
        tokens += len(sequence.token_ids)
        if groups[-1] and (tokens > BUCKETS[-1] or len(groups[-1]) == MOST_SEQUENCES):
            groups.append([])
            tokens = len(sequence.token_ids)
        groups[-1].append(sequence)
    return groups
