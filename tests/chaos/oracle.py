"""Requests, what an undisturbed verifier answers to them without speculation, and how any answer compares with that."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from treeline.client import TreelineClient
from treeline.v1 import generation_pb2 as pb

POLICIES = ("off", "chain:4", "static:4-2-1", "eagle2:5,4,16", "smart-paper", "smart")
WORDS = ("one", "two", "three", "snow", "tree", "line", "größer", "日本", "pine")
LOGPROB_TOLERANCE = 1e-3
"""Other batches add in another order."""


@dataclass
class Answer:
    """What has come of a stream so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    completes: list[pb.GenerateComplete] = field(default_factory=list)

    def take(self, message: pb.GenerateChunk | pb.GenerateComplete) -> None:
        if isinstance(message, pb.GenerateComplete):
            self.completes.append(message)
            return
        assert not self.completes, "a chunk behind the completion"
        self.text += message.text
        self.token_ids += message.token_ids
        self.logprobs += [position.chosen.logprob for position in message.logprobs]


@dataclass
class Case:
    """A request, as arguments of TreelineClient.generate, and its answer."""

    arguments: dict[str, Any]
    expected: Answer = field(default_factory=Answer)

    def problem(self, answer: Answer) -> str:
        """What is wrong with `answer`, complete or cut; empty if nothing is."""
        expected, count = self.expected, len(answer.token_ids)
        aborted = [complete.finish_reason == pb.FINISH_REASON_ABORTED for complete in answer.completes]
        if len(answer.completes) > 1:
            return "completed twice"
        if answer.completes and answer.completes[0].usage.completion_tokens != count:
            return f"{count} tokens came, {answer.completes[0].usage.completion_tokens} were counted"
        if aborted == [False]:
            if answer.completes[0].finish_reason != expected.completes[0].finish_reason:
                return f"ended with {answer.completes[0].finish_reason}"
            if (answer.token_ids, answer.text) != (expected.token_ids, expected.text):
                return f"other text: {_difference(answer.token_ids, expected.token_ids)}"
        elif answer.token_ids != expected.token_ids[:count] or not expected.text.startswith(answer.text):
            return f"no prefix: {_difference(answer.token_ids, expected.token_ids)}"
        if self.arguments.get("logprobs") is not None:
            if len(answer.logprobs) != count:
                return f"{len(answer.logprobs)} log-probabilities of {count} tokens"
            pairs = zip(answer.logprobs, expected.logprobs, strict=False)
            if any(abs(one - other) > LOGPROB_TOLERANCE for one, other in pairs):
                return "other log-probabilities"
        return ""


def _difference(tokens: list[int], expected: list[int]) -> str:
    at = next((i for i, (one, other) in enumerate(zip(tokens, expected, strict=False)) if one != other), -1)
    return f"{len(tokens)} of {len(expected)} tokens, the first wrong one at {at}"


def read(messages: Iterable[pb.GenerateChunk | pb.GenerateComplete]) -> Answer:
    answer = Answer()
    for message in messages:
        answer.take(message)
    return answer


def make_cases(rng: random.Random, count: int, client: TreelineClient) -> list[Case]:
    """Requests of all kinds, answered by the verifier of `client`."""
    cases = [Case(_arguments(rng)) for _ in range(count)]
    for case in cases:
        case.expected = read(client.generate(**case.arguments, policy="off"))
    return cases


def _arguments(rng: random.Random) -> dict[str, Any]:
    start = rng.choice(("", "one two three, " * 8))  # some share a prefix
    arguments: dict[str, Any] = {
        "prompt": start + " ".join(rng.choices(WORDS, k=rng.randint(2, 20))),
        "max_tokens": rng.choice((10, 30, 100, 150, 200)),
        "seed": rng.getrandbits(60),
        "temperature": rng.choice((0.0, 0.0, 0.7, 1.2)),
    }
    options: list[dict[str, Any]] = [
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"top_p": 0.9, "top_k": 40},
        {"min_p": 0.02, "logit_bias": {65: 3.0, 66: -100.0}},
        {"logprobs": 2},
        {"stop": [rng.choice("aeiou") + rng.choice("nrst"), "zq"], "include_stop": rng.random() < 0.5},
        {"stop_token_ids": [rng.randrange(256)], "min_tokens": 10},
        {"grammar": pb.Grammar(regex="([a-z]{2,9} ){20,60}")},
        {"priority": rng.randint(-4, 4)},
    ]
    for option in rng.sample(options, rng.randint(0, 3)):
        arguments |= option
    return arguments
