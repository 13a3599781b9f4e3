"""The identity of a request: its client, its id and its seed."""

from __future__ import annotations

import re
import secrets
import uuid

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
"""Metadata from front door to verifier: whose request this is, and what its share weighs among others'."""


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
    """How many answers are asked for. A number that the verifier refuses counts as the nearest that it does not."""
    return min(max(request.n, 1), MAX_ANSWERS)


def note(request: pb.GenerateRequest, response: pb.GenerateResponse, elapsed_s: float) -> None:
    """Add to `request.resume` what `response` brings, `elapsed_s` after the request was first sent."""
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
    """Which answer it belongs to."""
    return response.chunk.index or response.complete.index


def ends_all(request: pb.GenerateRequest, response: pb.GenerateResponse) -> bool:
    """Whether nothing follows `response`, which was noted in `request`."""
    return response.HasField("complete") and all(answer.complete for answer in request.resume.answers)


def identity(request: pb.GenerateRequest) -> tuple[tuple[str, str], ...]:
    """The initial metadata that names the id and the seed of `request`."""
    return (REQUEST_ID, request.request_id), (SEED, str(request.sampling.seed))
