"""What the HTTP port costs beside gRPC: a running service gives the same answers over both, in turns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from statistics import median
from typing import Any, NamedTuple

from bench.common import Prompt
from treeline.client import TreelineClient
from treeline.errors import TreelineError
from treeline.v1 import generation_pb2 as pb

IN_TURN = ("grpc", "http", "http", "grpc")
"""A machine that gets slower or faster meanwhile does so for both alike."""
TIMEOUT_S = 600.0


class Answer(NamedTuple):
    """One answer as its reader sees it."""

    tokens: int
    first_token_s: float


class Block(NamedTuple):
    """All answers over one transport, `streams` at a time."""

    tokens_per_s: float
    ttft_ms: float


Stream = Callable[[Sequence[Prompt]], list[Answer]]
"""Answers prompts one after the other."""


def grpc_stream(client: TreelineClient, max_tokens: int, prompts: Sequence[Prompt]) -> list[Answer]:
    answers = []
    for prompt in prompts:
        asked_s, first_s, tokens = time.perf_counter(), None, 0
        messages = client.generate(prompt.text, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        for message in messages:
            first_s = first_s or time.perf_counter()
            if isinstance(message, pb.GenerateComplete):
                tokens = message.usage.completion_tokens
        answers.append(Answer(tokens, (first_s or time.perf_counter()) - asked_s))
    return answers


def http_stream(address: str, token: str | None, max_tokens: int, prompts: Sequence[Prompt]) -> list[Answer]:
    """Over one connection, as the clients that people have keep theirs.

    Raises:
        TreelineError: the service refuses.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    answers = []
    with closing(HTTPConnection(address, timeout=TIMEOUT_S)) as connection:
        for prompt in prompts:
            asked_s, first_s, tokens = time.perf_counter(), None, 0
            fields = {"prompt": prompt.text, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
            body = json.dumps(fields | {"stream": True, "stream_options": {"include_usage": True}})
            connection.request("POST", "/v1/completions", body, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise TreelineError(f"{address}: {response.read().decode(errors='replace')}")
            for line in response:
                if line.startswith(b"data: {"):
                    first_s = first_s or time.perf_counter()
                    event = json.loads(line[len(b"data: ") :])
                    tokens = event["usage"]["completion_tokens"] if event.get("usage") else tokens
            answers.append(Answer(tokens, (first_s or time.perf_counter()) - asked_s))
    return answers


def run_transports(
    client: TreelineClient,
    http_address: str,
    token: str | None,
    prompts: Sequence[Prompt],
    streams: int,
    rounds: int,
    per_stream: int,
    max_tokens: int,
) -> Iterator[tuple[int, str, Block]]:
    """(round, transport, block) as they end. Round 0 is the warm-up: it puts the prompts into the prefix cache.

    Every block has the same prompts, all answers `max_tokens` tokens long.
    """
    over: dict[str, Stream] = {
        "grpc": partial(grpc_stream, client, max_tokens),
        "http": partial(http_stream, http_address, token, max_tokens),
    }
    asked = [prompts[i % len(prompts)] for i in range(streams * per_stream)]
    for round_ in range(rounds + 1):
        for transport in IN_TURN if round_ else over:
            yield round_, transport, _block(over[transport], asked, streams)


def rows_of(blocks: Sequence[tuple[int, str, Block]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row a transport (medians over blocks, with extremes), and what HTTP costs: the medians over rounds.

    `http_tokens_per_s_cost` is the share of gRPC's tokens per second that HTTP lacks; `http_ttft_cost_ms` is added.
    """
    counted = [entry for entry in blocks if entry[0]]
    rows: list[dict[str, Any]] = []
    for transport in dict.fromkeys(IN_TURN):
        row: dict[str, Any] = {"transport": transport}
        for name in Block._fields:
            values = [getattr(block, name) for _, other, block in counted if other == transport]
            row |= {name: median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
        rows.append(row)

    def each(name: str, transport: str) -> list[float]:
        """The mean of each round."""
        means = []
        for round_ in sorted({entry[0] for entry in counted}):
            values = [getattr(b, name) for r, other, b in counted if (r, other) == (round_, transport)]
            means.append(sum(values) / len(values))
        return means

    rates = zip(each("tokens_per_s", "http"), each("tokens_per_s", "grpc"), strict=True)
    waits = zip(each("ttft_ms", "http"), each("ttft_ms", "grpc"), strict=True)
    return rows, {
        "http_tokens_per_s_cost": median(1 - http / grpc for http, grpc in rates),
        "http_ttft_cost_ms": median(http - grpc for http, grpc in waits),
    }


def _block(stream: Stream, asked: Sequence[Prompt], streams: int) -> Block:
    started_s = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        answers = [a for each in pool.map(stream, [asked[i::streams] for i in range(streams)]) for a in each]
    took_s = time.perf_counter() - started_s
    return Block(sum(a.tokens for a in answers) / took_s, 1000 * median(a.first_token_s for a in answers))
