"""A request: its fields, its identity (client, id and seed), and how far it has come."""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from treeline.errors import FieldViolation, InvalidRequestError
from treeline.v1 import generation_pb2 as pb

MAX_ANSWERS = 16
"""Most answers (`n`) to one request: each takes a slot and a place in the queue."""
MAX_PRIORITY = 4
"""Priorities lie in [-MAX_PRIORITY, MAX_PRIORITY]."""
MAX_REQUEST_ID_CHARS = 128
SEED_BITS = 63
"""Seeds are uint64 on the wire; 63 bits also fit the signed integers of other languages."""
REQUEST_ID, SEED = "treeline-request-id", "treeline-seed"
"""Initial metadata of a stream. With the token ids it has received, a client can resume the stream."""

CLIENT, WEIGHT = "treeline-client", "treeline-client-weight"
"""Metadata from front door to verifier: the client of a request, and the weight of its share."""


_PARTS: dict[str, Any] = {
    "sampling": pb.SamplingParams,
    "stopping": pb.StoppingParams,
    "output": pb.OutputOptions,
    "speculation": pb.SpeculationOptions,
}


class GenerateOptions(TypedDict, total=False):
    """Fields of GenerateRequest and of the messages in it, as in generation.proto. None: the server's default."""

    request_id: str
    model: str
    priority: int
    n: int | None
    target_time_per_output_token_ms: float | None
    grammar: pb.Grammar | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    skip_special_tokens: bool
    explain: bool
    explain_tree: bool
    policy: str | None
    max_nodes: int | None
    max_depth: int | None


def generate_request(**fields: Any) -> pb.GenerateRequest:
    """A request with its input and `GenerateOptions`, each in the message that has that field.

    Raises:
        ValueError: no message has such a field, or a value does not fit its field.
        TypeError: a value's type does not fit its field.
    """
    parts = {
        part: kind(**{name: fields.pop(name) for name in kind.DESCRIPTOR.fields_by_name if name in fields})
        for part, kind in _PARTS.items()
    }
    return pb.GenerateRequest(**parts, **fields)


def identify(request: pb.GenerateRequest) -> None:
    """Give `request` an id and a seed if it has none. Both stay the same wherever the request runs.

    Raises:
        InvalidRequestError: the id cannot be sent as metadata, or is too long.
    """
    if len(request.request_id) > MAX_REQUEST_ID_CHARS or not re.fullmatch("[!-~]*", request.request_id):
        problem = f"must be at most {MAX_REQUEST_ID_CHARS} printable ASCII characters without spaces"
        raise InvalidRequestError(FieldViolation("request_id", problem))
    if not request.request_id:
        request.request_id = uuid.uuid4().hex
    if not request.sampling.HasField("seed"):
        request.sampling.seed = secrets.randbits(SEED_BITS)


def answers_of(request: pb.GenerateRequest) -> int:
    """How many answers are asked for. A number that the verifier refuses counts as the nearest valid one."""
    return min(max(request.n, 1), MAX_ANSWERS)


def note(request: pb.GenerateRequest, response: pb.GenerateResponse, elapsed_s: float) -> None:
    """Record `response` in `request.resume`, `elapsed_s` after the request was first sent."""
    resume, answers = request.resume, answers_of(request)
    if not delivered_tokens(request):
        resume.time_to_first_token_s = elapsed_s
    if answers == 1:
        resume.token_ids.extend(response.chunk.token_ids)
        return
    resume.answers.extend(pb.ResumedAnswer() for _ in range(answers - len(resume.answers)))
    answer = resume.answers[index_of(response)]
    answer.token_ids.extend(response.chunk.token_ids)
    answer.complete = response.HasField("complete")


def delivered_tokens(request: pb.GenerateRequest) -> int:
    """Tokens of all answers that the client has received."""
    resume = request.resume
    return len(resume.token_ids) + sum(len(answer.token_ids) for answer in resume.answers)


def index_of(response: pb.GenerateResponse) -> int:
    """Index of the answer that it belongs to."""
    return response.chunk.index or response.complete.index


def ends_all(request: pb.GenerateRequest, response: pb.GenerateResponse) -> bool:
    """Whether `response`, already recorded in `request`, is the last one."""
    return response.HasField("complete") and all(answer.complete for answer in request.resume.answers)


def identity(request: pb.GenerateRequest) -> tuple[tuple[str, str], ...]:
    """The initial metadata that names the id and the seed of `request`."""
    return (REQUEST_ID, request.request_id), (SEED, str(request.sampling.seed))
