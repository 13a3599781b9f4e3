"""`python -m tests.chaos.overload HOST:PORT`: ten times the requests that a running service can answer, for a minute.

Goodput under overload stands beside its peak, that of a closed loop, taken before and after. The clients share the
service's machine, so that their own time counts against it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import dataclass, field

import grpc
import numpy as np

from bench.common import load_prompts
from treeline.v1 import generation_pb2 as pb

STREAMS = 20
"""Of the closed loop: more than the 16 slots of the default configuration, so that none is ever empty."""
SETTLE_S = 5.0
"""Of every loop, before tokens count."""


@dataclass
class Clients:
    """Sends requests one by one and remembers what came of them, at seconds of `time.monotonic`.

    Attributes:
        tokens: when each chunk came, and how many tokens it held.
        finished: when each answer ended.
        refusals: how many seconds each refusal took.
        failures: all other statuses.
    """

    channel: grpc.aio.Channel
    messages: list[bytes]
    tokens: list[tuple[float, int]] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    sent: int = 0

    async def ask(self) -> None:
        message, began_s = self.messages[self.sent % len(self.messages)], time.monotonic()
        self.sent += 1
        generate = self.channel.unary_stream(
            "/treeline.v1.GenerationService/Generate", response_deserializer=pb.GenerateResponse.FromString
        )
        try:
            async for response in generate(message):
                self.tokens.append((time.monotonic(), len(response.chunk.token_ids)))
            self.finished.append(time.monotonic())
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self.refusals.append(time.monotonic() - began_s)
            else:
                self.failures.append(f"{error.code().name}: {error.details()}")

    def tokens_per_s(self, since_s: float, until_s: float) -> float:
        return sum(count for at_s, count in self.tokens if since_s < at_s <= until_s) / (until_s - since_s)

    def answers_per_s(self, since_s: float, until_s: float) -> float:
        return sum(since_s < at_s <= until_s for at_s in self.finished) / (until_s - since_s)

    async def peak(self, seconds: float) -> tuple[float, float]:
        """Tokens and answers per second of a closed loop."""
        since_s = time.monotonic() + SETTLE_S
        until_s = since_s + seconds

        async def stream() -> None:
            while time.monotonic() < until_s:
                await self.ask()

        await asyncio.gather(*(stream() for _ in range(STREAMS)))
        return self.tokens_per_s(since_s, until_s), self.answers_per_s(since_s, until_s)

    async def overload(self, seconds: float, per_s: float, rng: random.Random) -> float:
        """Tokens per second while requests come `per_s` a second, at random times."""
        due_s = time.monotonic()
        since_s, until_s, open_calls = due_s + SETTLE_S, due_s + SETTLE_S + seconds, set[asyncio.Task[None]]()
        while due_s < until_s:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            call = asyncio.create_task(self.ask())
            open_calls.add(call)
            call.add_done_callback(open_calls.discard)
            due_s += rng.expovariate(per_s)
        tokens_per_s = self.tokens_per_s(since_s, time.monotonic())
        for call in list(open_calls):
            call.cancel()
        await asyncio.gather(*open_calls, return_exceptions=True)
        return tokens_per_s


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint", metavar="HOST:PORT")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload; the peaks take half as long each")
    parser.add_argument("--factor", type=float, default=10.0, help="requests for each one that can be answered")
    parser.add_argument("--max-tokens", type=int, default=256, help="of every answer; 256 is the API's default")
    options = parser.parse_args()
    stopping = pb.StoppingParams(max_tokens=options.max_tokens, ignore_eos=True)
    messages = [
        pb.GenerateRequest(prompt=prompt.text, stopping=stopping).SerializeToString() for prompt in load_prompts(None)
    ]
    async with grpc.aio.insecure_channel(options.endpoint) as channel:
        clients = Clients(channel, messages)
        before, answers_per_s = await clients.peak(options.seconds / 2)
        clients.refusals.clear()
        over = await clients.overload(options.seconds, options.factor * answers_per_s, random.Random(0))
        began_s, waits_ms = time.monotonic(), 1000 * np.asarray(clients.refusals or [0.0])
        refused = len(clients.refusals)
        await clients.ask()
        normal_s = time.monotonic() - began_s
        after, _ = await clients.peak(options.seconds / 2)
    print(f"peak {before:.0f} and {after:.0f} tokens/s, {answers_per_s:.1f} answers/s")
    print(f"overload {over:.0f} tokens/s: {2 * over / (before + after):.2f} of the peak")
    print(f"{refused} refusals: p50 {np.quantile(waits_ms, 0.5):.0f} ms, p99 {np.quantile(waits_ms, 0.99):.0f} ms")
    print(f"{len(clients.failures)} other failures {clients.failures[:1]}; the next answer took {normal_s:.1f} s")


if __name__ == "__main__":
    asyncio.run(main())
