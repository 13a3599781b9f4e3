"""Tensor parallelism within one machine. Rank 0 schedules, samples and owns all state. The other ranks are its child
processes: each holds its part of the weights and of the KV cache, and runs passes with rank 0.

A pass is sent to them as one array of integers: each sequence's new tokens and block table.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import threading
from multiprocessing import connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lm.device import torch_device
from lm.kv_cache import KVCache, SequenceCache
from lm.layers.sharded import Shard
from lm.model import LanguageModel
from lm.packed import PackedSequence
from treeline.config import ModelConfig

logger = logging.getLogger(__name__)

WANTED: tuple[Literal["all", "last", "none"], ...] = ("all", "last", "none")
FIELDS = 6
"""Of each sequence: numbers of blocks, committed tokens, scratch entries, new tokens and parents (-1 for a causal
run), and which rows are wanted."""


def load_model(config: ModelConfig) -> LanguageModel:
    """As `LanguageModel.load`, with followers if the model is to be spread over several devices."""
    if config.tensor_parallel == 1:
        return LanguageModel.load(config)
    followers = Followers(config)
    try:
        model = followers.join(config, Shard(0, config.tensor_parallel))
    except BaseException:
        followers.close()
        raise
    model.passes.announce = followers.tell
    return model


class Followers:
    """The other ranks, as rank 0 sees them. If one exits, so does this process: it cannot go on without it."""

    def __init__(self, config: ModelConfig) -> None:
        self._folder = TemporaryDirectory()
        self._meeting = Path(self._folder.name) / "meeting"
        self._closed = False
        spawn = multiprocessing.get_context("spawn")
        self._pipes, self.processes = [], []
        for rank in range(1, config.tensor_parallel):
            own, theirs = spawn.Pipe()
            shard = Shard(rank, config.tensor_parallel)
            process = spawn.Process(target=follow, args=(config, shard, self._meeting, theirs), daemon=True)
            process.start()
            theirs.close()  # Else it stays open when the follower ends.
            self._pipes.append(own)
            self.processes.append(process)
        threading.Thread(target=self._watch, name="followers", daemon=True).start()
        atexit.register(self.close)

    def join(self, config: ModelConfig, shard: Shard) -> LanguageModel:
        """Rank 0's part of the model, once all ranks have theirs."""
        return _joined(config, shard, self._meeting)

    def tell(self, order: str, *about: Any) -> None:
        """Tell all followers what this process does next: see `follow`."""
        told = (order, _packed(*about)) if order == "pass" else (order, *about)
        for pipe in self._pipes:
            pipe.send(told)

    def close(self) -> None:
        """End them."""
        self._closed = True
        for process in self.processes:
            process.kill()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._folder.cleanup()

    def _watch(self) -> None:
        connection.wait([process.sentinel for process in self.processes])
        if not self._closed:
            codes = [process.exitcode for process in self.processes]
            logger.critical("a rank of the model ended (exit codes %s), and this process with it", codes)
            os._exit(1)  # A collective that waits for the lost rank can't be interrupted.


def follow(config: ModelConfig, shard: Shard, meeting: Path, pipe: connection.Connection) -> None:
    """Main loop of the other ranks: run rank 0's orders in sequence until it is gone.

    ("pass", array) runs a pass, ("move", sources, targets) moves KV entries, ("forget",) drops captured passes.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Rank 0 gets them too, and finishes its requests.
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    model = _joined(config, shard, meeting)
    cache: KVCache | None = None
    while True:
        try:
            order, *about = pipe.recv()
        except EOFError:
            return
        if order == "pass":
            tokens, block_tokens, sequences = _unpacked(about[0])
            if cache is None or (cache.trash_slot, cache.block_tokens) != (tokens, block_tokens):
                cache = None  # Its memory is needed for the new one.
                cache = model.new_cache(tokens, block_tokens)
            model.forward(sequences, cache)
        elif order == "move":
            assert cache is not None
            cache.move(*about)
        else:
            model.passes.forget_captured()


def _end_with_rank_0() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)  # Even from a collective: no device stays held without rank 0.


def _joined(config: ModelConfig, shard: Shard, meeting: Path) -> LanguageModel:
    device = torch_device(config.device, shard.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # All ranks are on this machine.
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{meeting}",
        rank=shard.rank,
        world_size=shard.size,
        device_id=device if device.type == "cuda" else None,
    )
    model = LanguageModel.load(config, shard)
    model.passes.in_lockstep = True
    return model


def _packed(sequences: list[PackedSequence], cache: KVCache) -> NDArray[np.int32]:
    """A pass as one array: the cache's slots and block size, number of sequences, `FIELDS` of each; then each one's
    blocks, new tokens and parents."""
    fields, columns = [], []
    for each in sequences:
        place, parents = each.cache, each.parents
        used = place.table[: -(-(place.length + place.scratch + len(each.token_ids)) // place.block_tokens)]
        count = -1 if parents is None else len(parents)
        fields += [len(used), place.length, place.scratch, len(each.token_ids), count, WANTED.index(each.logits)]
        columns += [used, each.token_ids, () if parents is None else parents]
    head = [cache.trash_slot, cache.block_tokens, len(sequences), *fields]
    return np.concatenate([np.asarray(column, np.int32) for column in (head, *columns)])


def _unpacked(array: NDArray[np.int32]) -> tuple[int, int, list[PackedSequence]]:
    """Undoes `_packed`: the cache's slots and block size, and the sequences with stand-ins for their caches."""
    tokens, block_tokens, count = array[:3].tolist()
    sequences, place = [], 3 + count * FIELDS
    for blocks, length, scratch, new, parents, wanted in array[3:place].reshape(count, FIELDS).tolist():
        sizes = (blocks, new, max(0, parents))
        table, token_ids, above = np.split(array[place : place + sum(sizes)], np.cumsum(sizes)[:-1])
        place += sum(sizes)
        kept = SequenceCache(table.tolist(), block_tokens, length, scratch)
        sequences.append(PackedSequence(kept, token_ids.tolist(), above if parents >= 0 else None, WANTED[wanted]))
    return tokens, block_tokens, sequences
