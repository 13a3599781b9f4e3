"""Generation responses in OpenAI's JSON: whole answers, and the chunks of a stream."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from front_door.http.tool_calls import CallPiece, Finder, Found
from treeline.v1 import generation_pb2 as pb

FINISH_REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length", pb.FINISH_REASON_ABORTED: "abort"}

CALL_ID_CHARS = 9
"""Mistral's templates refuse ids of any other length."""


class Dialect:
    """How one endpoint spells its answers. Chat and text completions differ in names only."""

    prefix: str
    whole_object: str
    chunk_object: str

    def choice(self, found: Found, logprobs: list[pb.PositionLogprobs], start: int) -> dict[str, Any]:
        """The answer's text, calls and log-probabilities as part of a whole answer's choice.

        `start`: where the first token of `logprobs` begins in the choice's text, in characters.
        """
        raise NotImplementedError

    def delta(self, found: Found, logprobs: list[pb.PositionLogprobs], start: int, first: bool) -> dict[str, Any]:
        """The same as part of a chunk's choice."""
        raise NotImplementedError


class ChatDialect(Dialect):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, found: Found, logprobs: list[pb.PositionLogprobs], start: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": found.content}
        if found.calls:
            message |= {"content": found.content or None, "tool_calls": [_call(call) for call in _joined(found.calls)]}
        return {"message": message, "logprobs": _chat_logprobs(logprobs)}

    def delta(self, found: Found, logprobs: list[pb.PositionLogprobs], start: int, first: bool) -> dict[str, Any]:
        text = found.content
        delta: dict[str, Any] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        if found.calls:
            delta["tool_calls"] = [{"index": call.number, **_call(call)} for call in _joined(found.calls)]
        return {"delta": delta, "logprobs": _chat_logprobs(logprobs)}


class CompletionDialect(Dialect):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, found: Found, logprobs: list[pb.PositionLogprobs], start: int) -> dict[str, Any]:
        return {"text": found.content, "logprobs": _completion_logprobs(logprobs, start)}

    def delta(self, found: Found, logprobs: list[pb.PositionLogprobs], start: int, first: bool) -> dict[str, Any]:
        return self.choice(found, logprobs, start)


class Reply:
    """The frame of one HTTP answer: its id, model and time.

    Args:
        echoed: what the text of each choice begins with.
        finders: find the tool calls of each choice.
    """

    def __init__(self, dialect: Dialect, request_id: str, model: str, echoed: list[str], finders: list[Finder]) -> None:
        self._dialect, self._echoed, self._finders = dialect, echoed, finders
        self._ends = [len(text) for text in echoed]  # of each choice's tokens so far, in characters
        self._called: set[int] = set()  # choices that have called a tool
        self._frame = {"id": f"{dialect.prefix}-{request_id}", "created": int(time.time()), "model": model}

    def whole(self, answers: Iterable[list[pb.GenerateResponse]]) -> dict[str, Any]:
        """One choice per finished answer, each given as its stream of responses."""
        choices, completes = [], []
        for index, responses in enumerate(answers):
            complete = responses[-1].complete
            parts = [self._found(index, response) for response in responses]
            pieces = [piece for part in parts for piece in part.pieces]
            found = Found([self._echoed[index], *pieces], [call for part in parts for call in part.calls])
            choice = self._dialect.choice(found, *self._positions(index, *responses))
            choice = {"index": index, **choice, **self._ending(index, complete)}
            choices.append(choice)
            completes.append(complete)
        body = {**self._frame, "object": self._dialect.whole_object, "choices": choices}
        return body | {"usage": usage(completes), "treeline": [_speculation(complete) for complete in completes]}

    def chunk(self, index: int, response: pb.GenerateResponse, first: bool) -> dict[str, Any]:
        """One response of the answer number `index` as a chunk; the last one has the finish reason."""
        found = self._found(index, response)
        if first:
            found.pieces.insert(0, self._echoed[index])
        delta = self._dialect.delta(found, *self._positions(index, response), first)
        choice = {"index": index, **delta, "finish_reason": None}
        extra = {}
        if response.HasField("complete"):
            choice |= self._ending(index, response.complete)
            extra = {"treeline": _speculation(response.complete)}
        elif response.chunk.HasField("speculation"):
            extra = {"treeline": _step(response.chunk.speculation)}
        return self._framed([choice]) | extra

    def usage_chunk(self, completes: list[pb.GenerateComplete]) -> dict[str, Any]:
        """The last chunk if `stream_options.include_usage` is set."""
        return self._framed([]) | {"usage": usage(completes)}

    def _found(self, index: int, response: pb.GenerateResponse) -> Found:
        finder = self._finders[index]
        found = finder.finish() if response.HasField("complete") else finder.feed(response.chunk.text)
        if found.calls:
            self._called.add(index)
        return found

    def _positions(self, index: int, *responses: pb.GenerateResponse) -> tuple[list[pb.PositionLogprobs], int]:
        """The log-probabilities of `responses`, and where the first one's token begins in the choice's text.

        Prompt tokens lie before the end of the echoed text. Special tokens in front of it are not part of it.
        """
        prompt = [position for response in responses for position in response.chunk.prompt_logprobs]
        answer = [position for response in responses for position in response.chunk.logprobs]
        start = self._ends[index] - _characters(prompt)
        self._ends[index] += _characters(answer)
        return [*prompt, *answer], start

    def _ending(self, index: int, complete: pb.GenerateComplete) -> dict[str, Any]:
        matched = complete.WhichOneof("matched_stop")
        reason = FINISH_REASONS.get(complete.finish_reason, "stop")
        return {
            "finish_reason": "tool_calls" if reason == "stop" and index in self._called else reason,
            "stop_reason": getattr(complete, matched) if matched else None,
        }

    def _framed(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._frame, "object": self._dialect.chunk_object, "choices": choices}


def usage(completes: list[pb.GenerateComplete]) -> dict[str, Any]:
    """Tokens of all answers; a prompt that is answered n times counts once."""
    prompt = max((complete.usage.prompt_tokens for complete in completes), default=0)
    completion = sum(complete.usage.completion_tokens for complete in completes)
    cached = min((complete.usage.cached_prompt_tokens for complete in completes), default=0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _joined(pieces: Iterable[CallPiece]) -> list[CallPiece]:
    """One piece per call."""
    joined: dict[int, CallPiece] = {}
    for piece in pieces:
        before = joined.get(piece.number)
        joined[piece.number] = before._replace(arguments=before.arguments + piece.arguments) if before else piece
    return list(joined.values())


def _call(piece: CallPiece) -> dict[str, Any]:
    if piece.name is None:
        return {"function": {"arguments": piece.arguments}}
    call_id = secrets.token_hex(5)[:CALL_ID_CHARS]
    return {"id": call_id, "type": "function", "function": {"name": piece.name, "arguments": piece.arguments}}


def _speculation(complete: pb.GenerateComplete) -> dict[str, Any]:
    summary, timings = complete.speculation, complete.timings
    return {
        "request_id": complete.request_id,
        "seed": complete.seed,
        "policy": complete.policy,
        "steps": summary.steps,
        "drafted_nodes": summary.drafted_nodes,
        "verified_nodes": summary.verified_nodes,
        "accepted_nodes": summary.accepted_nodes,
        "mean_accepted_length": summary.mean_accepted_length,
        "time_to_first_token_s": timings.time_to_first_token_s,
        "total_s": timings.total_s,
    }


def _step(step: pb.SpeculationStep) -> dict[str, Any]:
    nodes = [{name.name: getattr(node, name.name) for name in node.DESCRIPTOR.fields} for node in step.nodes]
    for node in nodes:
        node["fate"] = pb.NodeFate.Name(node["fate"]).removeprefix("NODE_FATE_").lower()
    return {field.name: getattr(step, field.name) for field in step.DESCRIPTOR.fields} | {"nodes": nodes}


def _token(entry: pb.TokenLogprob) -> dict[str, Any]:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.text.encode())}


def _characters(positions: Iterable[pb.PositionLogprobs]) -> int:
    return sum(len(position.chosen.text) for position in positions)


def _chat_logprobs(positions: list[pb.PositionLogprobs]) -> dict[str, Any] | None:
    if not positions:
        return None
    return {"content": [_token(p.chosen) | {"top_logprobs": [_token(top) for top in p.top]} for p in positions]}


def _completion_logprobs(positions: list[pb.PositionLogprobs], start: int) -> dict[str, Any] | None:
    if not positions:
        return None
    offsets = accumulate((len(position.chosen.text) for position in positions[:-1]), initial=start)
    return {
        "tokens": [p.chosen.text for p in positions],
        "token_logprobs": [None if math.isnan(p.chosen.logprob) else p.chosen.logprob for p in positions],
        "top_logprobs": [{top.text: top.logprob for top in p.top} for p in positions],
        "text_offset": [max(0, offset) for offset in offsets],
    }
