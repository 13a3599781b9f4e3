"""Policies under load, side by side: blocks take turns, so that machine noise hits all policies alike."""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Literal, Protocol

import numpy as np
import torch

import bench.baselines  # noqa: F401 - registers its policies
from bench.common import Prompt
from bench.load import (
    Answer,
    Clock,
    Loop,
    Measured,
    Request,
    System,
    closed_loop,
    in_turns,
    measure,
    open_loop,
    poisson_arrivals,
)
from lm.cpu.threads import own_cores
from planner.policies import canonical_spellings

OFF = "off"
MIN_SUCCESSORS = 32
"""A closed-loop block sends this many requests after the streams' first ones, or one per stream if that is more."""
MIN_ARRIVALS = 8
"""Requests of an open-loop block, or as many as arrive within a block's seconds if that is more."""
WARM_UP_SHARE = 0.5
"""Of a block's seconds."""
TURN_S = 0.2
"""Short enough that the machine's speed does not change between turns, long enough that switching costs nothing."""


@dataclass(frozen=True)
class Settings:
    """What to sweep.

    Attributes:
        policies: canonical spellings, `off` among them.
        concurrency: streams of each closed loop.
        rates: arrival rates of each open loop, relative to the capacity measured with `off`.
        block_s: time limit of a block; a policy too slow to end within it is measured for just these seconds.
        seed: of the order of prompts and of the arrivals.
    """

    policies: tuple[str, ...]
    concurrency: tuple[int, ...]
    rates: tuple[float, ...]
    rounds: int
    max_tokens: int
    block_s: float
    seed: int


@dataclass(frozen=True)
class Block:
    """One policy under one load for a while.

    Attributes:
        load: streams of a closed loop, relative rate of an open one.
        round: 0 is the warm-up, which is not counted.
    """

    loop: Literal["closed", "open"]
    load: float
    round: int
    policy: str


@dataclass(frozen=True)
class Result:
    """The result of a counted block.

    Attributes:
        requests_per_s: arrival rate; 0 for a closed loop.
    """

    block: Block
    measured: Measured
    answers: list[Answer] = field(repr=False)
    requests_per_s: float = 0.0


@dataclass(frozen=True)
class BlockRun:
    """A block that has been run.

    Attributes:
        seconds: its whole duration, without the turns of others.
        prompts_s: seconds until every stream of a closed loop had its first token; 0 for an open one.
        result: None for a warm-up.
    """

    block: Block
    seconds: float
    prompts_s: float
    result: Result | None


class Swept(Protocol):
    """What can be swept."""

    @property
    def device(self) -> torch.device | None:
        """Of the engines in this process, which stop while nobody polls them; None for a service."""
        ...

    def system(self, policy: str) -> System:
        """What requests of this policy are sent to."""
        ...


def checked_policies(specs: Sequence[str]) -> tuple[str, ...]:
    """`canonical_spellings`; `off` is put first if it is missing: every policy is compared with it."""
    policies = canonical_spellings(specs)
    return policies if OFF in policies else (OFF, *policies)


def closed_blocks(settings: Settings) -> list[Block]:
    """Load by load: a warm-up of every policy, then rounds, each begun by another policy: A B C, B C A, C A B."""
    return [
        Block("closed", streams, round_, policy)
        for streams in settings.concurrency
        for round_ in range(settings.rounds + 1)
        for policy in _in_turn(settings, max(1, round_))
    ]


def open_blocks(settings: Settings) -> list[Block]:
    """The same for open loops, which need no warm-up after the closed ones."""
    return [
        Block("open", rate, round_, policy)
        for rate in settings.rates
        for round_ in range(1, settings.rounds + 1)
        for policy in _in_turn(settings, round_)
    ]


def run_sweep(swept: Swept, prompts: Sequence[Prompt], settings: Settings) -> Iterator[BlockRun]:
    """Run all blocks; those of one round take turns where systems can be halted, and follow each other elsewhere."""
    shuffled = random.Random(settings.seed).sample(prompts, len(prompts))
    closed: list[Result] = []
    with own_cores(swept.device):
        for blocks in _rounds(closed_blocks(settings)):
            for run in _run_closed(swept, blocks, shuffled, settings):
                closed += [run.result] if run.result else []
                yield run
        if settings.rates:
            requests_per_s = capacity(closed)
            for blocks in _rounds(open_blocks(settings)):
                yield from _run_open(swept, blocks, shuffled, settings, blocks[0].load * requests_per_s)


def capacity(results: Sequence[Result]) -> float:
    """Requests per second that plain decoding completes at the highest concurrency swept, each run to its end."""
    plain = [result for result in results if result.block.policy == OFF]
    most = max(result.block.load for result in plain)
    tokens_per_s = float(np.median([r.measured.tokens_per_s for r in plain if r.block.load == most]))
    longest = max(answer.request.max_tokens for result in plain for answer in result.answers)
    ended = [len(a.token_ids) for r in plain for a in r.answers if a.finished and a.request.max_tokens == longest]
    return tokens_per_s / (float(np.mean(ended)) if ended else longest)


def closed_requests(block: Block, prompts: Sequence[Prompt], max_tokens: int) -> list[Request]:
    """The requests of a closed-loop block: the same for every policy, different in every round.

    The streams' first requests are cut to lengths evenly spread up to `max_tokens`, as in a steady state: prefills and
    endings are then spread over the block as they are in the long run. A warm-up is these first requests alone, at
    full length.
    """
    streams = int(block.load)
    if not block.round:
        return _requests(block, prompts, 0, [max_tokens] * streams)
    successors = max(MIN_SUCCESSORS, streams)
    lengths = [max(1, max_tokens * (i + 1) // streams) for i in range(streams)] + [max_tokens] * successors
    return _requests(block, prompts, (block.round - 1) * len(lengths), lengths)


def _run_closed(
    swept: Swept, blocks: Sequence[Block], prompts: Sequence[Prompt], settings: Settings
) -> Iterator[BlockRun]:
    round_, streams = blocks[0].round, int(blocks[0].load)
    limit_s = settings.block_s if round_ else WARM_UP_SHARE * settings.block_s
    loops = []
    for block in blocks:
        requests = closed_requests(block, prompts, settings.max_tokens)
        loops.append(partial(closed_loop, swept.system(block.policy), requests, streams, limit_s))
    return _run(swept, blocks, loops)


def _run_open(
    swept: Swept, blocks: Sequence[Block], prompts: Sequence[Prompt], settings: Settings, requests_per_s: float
) -> Iterator[BlockRun]:
    round_, count = blocks[0].round, max(MIN_ARRIVALS, round(requests_per_s * settings.block_s))
    arrivals_s = poisson_arrivals(requests_per_s, count, settings.seed + round_)
    loops = []
    for block in blocks:
        requests = _requests(block, prompts, (round_ - 1) * count, [settings.max_tokens] * count)
        loops.append(partial(open_loop, swept.system(block.policy), requests, arrivals_s))
    return _run(swept, blocks, loops, requests_per_s)


def _run(
    swept: Swept, blocks: Sequence[Block], loops: Sequence[Callable[[Clock], Loop]], requests_per_s: float = 0.0
) -> Iterator[BlockRun]:
    """Run the loops of these blocks, one each."""
    for index, window, seconds in in_turns(loops, math.inf if swept.device is None else TURN_S):
        block = blocks[index]
        result = Result(block, measure(window), window.answers, requests_per_s) if block.round else None
        yield BlockRun(block, seconds, window.opened_s if block.loop == "closed" else 0.0, result)


def _rounds(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """The blocks of each round of each load."""
    for _, round_ in groupby(blocks, key=lambda block: (block.load, block.round)):
        yield list(round_)


def _requests(block: Block, prompts: Sequence[Prompt], first: int, lengths: Sequence[int]) -> list[Request]:
    chosen = [prompts[(first + i) % len(prompts)] for i in range(len(lengths))]
    return [
        Request(uuid.uuid4().hex, prompt, max_tokens, block.policy)
        for prompt, max_tokens in zip(chosen, lengths, strict=True)
    ]


def _in_turn(settings: Settings, round_: int) -> tuple[str, ...]:
    """The policies in the order of a round, counted from 1; all policies get to begin about equally often."""
    by = (round_ - 1) * len(settings.policies) // settings.rounds
    return settings.policies[by:] + settings.policies[:by]
