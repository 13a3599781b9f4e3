"""Generation responses in OpenAI's JSON: whole answers, and the chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from treeline.v1 import generation_pb2 as pb

FINISH_REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length", pb.FINISH_REASON_ABORTED: "abort"}


class Dialect:
    """How one endpoint spells what it answers. Chat and text completions differ in names only."""

    prefix: str
    whole_object: str
    chunk_object: str

    def choice(self, text: str, logprobs: list[pb.PositionLogprobs]) -> dict[str, Any]:
        """The answer's text and log-probabilities as part of a whole answer's choice."""
        raise NotImplementedError

    def delta(self, text: str, logprobs: list[pb.PositionLogprobs], first: bool) -> dict[str, Any]:
        """The same as part of a chunk's choice."""
        raise NotImplementedError


class ChatDialect(Dialect):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str, logprobs: list[pb.PositionLogprobs]) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}, "logprobs": _chat_logprobs(logprobs)}

    def delta(self, text: str, logprobs: list[pb.PositionLogprobs], first: bool) -> dict[str, Any]:
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        return {"delta": delta, "logprobs": _chat_logprobs(logprobs)}


class CompletionDialect(Dialect):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, text: str, logprobs: list[pb.PositionLogprobs]) -> dict[str, Any]:
        return {"text": text, "logprobs": _completion_logprobs(logprobs)}

    def delta(self, text: str, logprobs: list[pb.PositionLogprobs], first: bool) -> dict[str, Any]:
        return self.choice(text, logprobs)


class Reply:
    """The frame of one HTTP answer: its id, model and time.

    Args:
        echoed: what the text of each choice begins with.
    """

    def __init__(self, dialect: Dialect, request_id: str, model: str, echoed: list[str]) -> None:
        self._dialect, self._echoed = dialect, echoed
        self._frame = {"id": f"{dialect.prefix}-{request_id}", "created": int(time.time()), "model": model}

    def whole(self, answers: Iterable[list[pb.GenerateResponse]]) -> dict[str, Any]:
        """One finished answer a choice, each as its stream of responses."""
        choices, completes = [], []
        for index, responses in enumerate(answers):
            chunks = [response.chunk for response in responses if response.HasField("chunk")]
            complete = responses[-1].complete
            text = self._echoed[index] + "".join(chunk.text for chunk in chunks)
            logprobs = [position for chunk in chunks for position in chunk.logprobs]
            choices.append({"index": index, **self._dialect.choice(text, logprobs), **_ending(complete)})
            completes.append(complete)
        body = {**self._frame, "object": self._dialect.whole_object, "choices": choices}
        return body | {"usage": usage(completes), "treeline": [_speculation(complete) for complete in completes]}

    def chunk(self, index: int, response: pb.GenerateResponse, first: bool) -> dict[str, Any]:
        """One response of the answer number `index` as a chunk; the last one has the finish reason."""
        if response.HasField("chunk"):
            chunk = response.chunk
            text = self._echoed[index] * first + chunk.text
            choice = {**self._dialect.delta(text, list(chunk.logprobs), first), "finish_reason": None}
            extra = {"treeline": _step(chunk.speculation)} if chunk.HasField("speculation") else {}
        else:
            choice = {**self._dialect.delta("", [], first), **_ending(response.complete)}
            extra = {"treeline": _speculation(response.complete)}
        return self._framed([{"index": index, **choice}]) | extra

    def usage_chunk(self, completes: list[pb.GenerateComplete]) -> dict[str, Any]:
        """What comes last if `stream_options.include_usage` is set."""
        return self._framed([]) | {"usage": usage(completes)}

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


def _ending(complete: pb.GenerateComplete) -> dict[str, Any]:
    matched = complete.WhichOneof("matched_stop")
    stop = getattr(complete, matched) if matched else None
    return {"finish_reason": FINISH_REASONS.get(complete.finish_reason, "stop"), "stop_reason": stop}


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


def _chat_logprobs(positions: list[pb.PositionLogprobs]) -> dict[str, Any] | None:
    if not positions:
        return None
    return {"content": [_token(p.chosen) | {"top_logprobs": [_token(top) for top in p.top]} for p in positions]}


def _completion_logprobs(positions: list[pb.PositionLogprobs]) -> dict[str, Any] | None:
    if not positions:
        return None
    return {
        "tokens": [p.chosen.text for p in positions],
        "token_logprobs": [p.chosen.logprob for p in positions],
        "top_logprobs": [{top.text: top.logprob for top in p.top} for p in positions],
    }
