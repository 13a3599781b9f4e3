"""The access log: one line per call at the clients' ports, with fields that explain its outcome."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import add
from typing import Any

import grpc

from treeline.rpc.tokens import Client
from treeline.v1 import generation_pb2 as pb

logger = logging.getLogger(__name__)

MAX_PROMPT_CHARS = 4096
"""Limit of a prompt in a line, if prompts are logged."""
MAX_ERROR_CHARS = 300
"""Limit of the error in a line: one mistake with its field takes 100."""
REFUSED = ("UNAUTHENTICATED", "401", "RESOURCE_EXHAUSTED", "429")
MAX_REFUSALS_PER_S = 10
"""Limits lines about calls without a valid token, which anybody can make, or without room: a log of 320 MiB holds two
days of them, and a line took a third of the time of a refusal."""
Fields = dict[str, Any]
_answers: ContextVar[list[Fields] | None] = ContextVar("answers", default=None)
"""The answers that the call of this context has asked for. Tasks of one call share the list."""
_COMBINED: dict[type, Callable[[Any, Any], Any]] = {
    int: add,
    float: max,
    str: lambda one, other: one if one == other else f"{one},{other}",
}


class AccessLog:
    """Writes the lines; a `CallObserver`. A call that succeeded without generating anything is logged at DEBUG."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._refusals, self._refusals_since_s = clock, 0, -math.inf

    def started(self, method: str) -> None:
        """Call it in the call's own task."""
        _answers.set([])

    def handled(
        self, method: str, code: str, seconds: float, error: str = "", quiet: bool = False, **known: str
    ) -> None:
        """`quiet`: log this call at DEBUG even if it failed. `error`, `known`: fields that its answers may lack."""
        answers = _answers.get() or []
        matters = not quiet and (answers or code not in ("OK", "200"))
        fields = {"method": method, "code": code, "seconds": seconds}
        fields |= {name: value for name, value in {**known, "error": error}.items() if value} | combined(answers)
        if code in REFUSED:
            left_out = self._left_out()
            if left_out is None:
                return
            fields |= {"left_out": left_out} if left_out else {}
        logger.log(logging.INFO if matters else logging.DEBUG, "%s %s", method, code, extra=_brief(fields))

    def _left_out(self) -> int | None:
        """How many refusals before this one were not logged. None: nor is this one."""
        now, left_out = self._clock(), max(0, self._refusals - MAX_REFUSALS_PER_S)
        if now - self._refusals_since_s >= 1:
            self._refusals, self._refusals_since_s = 1, now
            return left_out
        self._refusals += 1
        return None if self._refusals > MAX_REFUSALS_PER_S else 0


@contextmanager
def answering(request: pb.GenerateRequest, client: Client, address: str, prompts: bool) -> Iterator[Fields]:
    """The fields of one answer, for the line of its call. More may be added until the answer ends."""
    fields: Fields = {"request_id": request.request_id, "client": client.name, "address": address}
    if prompts:
        asked = request.WhichOneof("input")
        fields["prompt"] = str(getattr(request, asked))[:MAX_PROMPT_CHARS] if asked else ""
    answers = _answers.get()
    if answers is not None:
        answers.append(fields)
    try:
        yield fields
    except (asyncio.CancelledError, GeneratorExit):
        fields["error"] = "cancelled"
        raise
    except grpc.aio.AioRpcError as error:
        fields["error"] = error.details() or error.code().name
        raise
    except Exception as error:
        fields["error"] = str(error)
        raise


def completed(complete: pb.GenerateComplete) -> Fields:
    """Fields from the end of an answer. `queue_s`, `prefill_s` and `decode_s` add up to its whole time."""
    times, speculation, usage = complete.timings, complete.speculation, complete.usage
    return {
        "policy": complete.policy,
        "price": speculation.mean_price,
        "finish": pb.FinishReason.Name(complete.finish_reason).removeprefix("FINISH_REASON_").lower(),
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "queue_s": times.queue_s,
        "prefill_s": max(0.0, times.time_to_first_token_s - times.queue_s),
        "first_token_s": times.time_to_first_token_s,
        "decode_s": max(0.0, times.total_s - times.time_to_first_token_s),
        "accepted_length": speculation.mean_accepted_length,
        "tree_nodes": speculation.mean_tree_nodes,
        "preemptions": times.preemptions,
    }


def combined(answers: list[Fields]) -> Fields:
    """The fields of several answers to one call (OpenAI's `n`): counts are summed, times and means take the largest."""
    together: Fields = {}
    for answer in answers:
        for name, value in answer.items():
            known = together.get(name)
            together[name] = value if known is None else _COMBINED[type(value)](known, value)
    return together


def _brief(fields: Fields) -> Fields:
    brief: Fields = {name: round(value, 4) if isinstance(value, float) else value for name, value in fields.items()}
    return brief | ({"error": brief["error"][:MAX_ERROR_CHARS]} if "error" in brief else {})
