"""The same prompts through us and through our peers, end to end: tokens per second, and how many answers agree."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.common import Row, spread

Answers = list[list[int]]
Answerer = Callable[[list[list[int]], int], Answers]
"""(prompts as token ids, requests at a time) -> the new tokens of each, greedy."""


@dataclass(frozen=True)
class Peer:
    """One system in one mode.

    Attributes:
        serial: it answers one request at a time, however many there are; one measurement serves every concurrency.
        note: what a reader of its numbers has to know.
    """

    system: str
    mode: str
    answer: Answerer
    serial: bool = False
    note: str = ""


class MissingPeerError(Exception):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True)
class Missing:
    system: str
    mode: str
    reason: str


@dataclass
class Lineup:
    """The peers that can run, and those that cannot. The first peer's answers are the reference.

    Attributes:
        on_progress: called with the next peer built: some convert the model for a while.
    """

    on_progress: Callable[[str], None] = lambda what: None
    peers: list[Peer] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def add(
        self, system: str, mode: str, build: Callable[[], Answerer], *, serial: bool = False, note: str = ""
    ) -> None:
        """Build a peer, or note why it is missing."""
        self.on_progress(f"loading {system} {mode}")
        try:
            self.peers.append(Peer(system, mode, build(), serial, note))
        except MissingPeerError as error:
            self.missing.append(Missing(system, mode, str(error)))


def run_peers(
    lineup: Lineup,
    prompts: list[list[int]],
    eos_token_ids: frozenset[int],
    rounds: int,
    concurrencies: list[int],
    on_progress: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Every peer answers all prompts once per round, and peers take turns; the first prompt alone warms each up.

    A peer that fails on its first prompt is moved to the missing ones.

    A row is one peer at one concurrency; "agreement": the share of answers that equal transformers' plain greedy ones.

    Args:
        on_progress: called with what comes next: each peer's warm-up, each peer at each concurrency in each round.
    """
    _warm_up(lineup, prompts[:1], on_progress)
    rates: dict[tuple[int, int], list[float]] = {}
    answers: dict[tuple[int, int], Answers] = {}
    for _ in range(rounds):
        for index, peer in enumerate(lineup.peers):
            for concurrency in [1] if peer.serial else concurrencies:
                on_progress(f"{peer.system} {peer.mode}, {concurrency}")
                started_s = time.perf_counter()
                said = peer.answer(prompts, concurrency)
                elapsed_s = time.perf_counter() - started_s
                answers[index, concurrency] = [_without_end(ids, eos_token_ids) for ids in said]
                rates.setdefault((index, concurrency), []).append(sum(map(len, said)) / elapsed_s)
    reference = answers[0, 1]
    rows = []
    for index, peer in enumerate(lineup.peers):
        for concurrency in concurrencies:
            run = (index, 1 if peer.serial else concurrency)
            same = sum(a == b for a, b in zip(answers[run], reference, strict=True)) / len(prompts)
            named = {"system": peer.system, "mode": peer.mode, "concurrency": concurrency}
            rows.append({**named, **spread("tokens_per_s", rates[run]), "agreement": same, "note": peer.note})
    return rows


def _warm_up(lineup: Lineup, prompts: list[list[int]], on_progress: Callable[[str], None]) -> None:
    for peer in list(lineup.peers):
        on_progress(f"{peer.system} {peer.mode}, warm-up")
        try:
            peer.answer(prompts, 1)
        except MissingPeerError as error:
            lineup.peers.remove(peer)
            lineup.missing.append(Missing(peer.system, peer.mode, str(error)))


def _without_end(token_ids: list[int], eos_token_ids: frozenset[int]) -> list[int]:
    """Systems differ in whether they return the token that ended a text."""
    return token_ids[:-1] if token_ids and token_ids[-1] in eos_token_ids else token_ids
