"""The identity of a request: its client, its id and its seed."""

from __future__ import annotations

import secrets
import uuid

from treeline.v1 import generation_pb2 as pb

SEED_BITS = 63
"""Seeds are uint64 on the wire; 63 bits also fit the signed integers of other languages."""
REQUEST_ID, SEED = "treeline-request-id", "treeline-seed"
"""Initial metadata of a stream. With the token ids it has received, a client can resume the stream."""

CLIENT, WEIGHT = "treeline-client", "treeline-client-weight"
"""Metadata from front door to verifier: whose request this is, and what its share weighs among others'."""


def identify(request: pb.GenerateRequest) -> None:
    """Give `request` an id and a seed if it has none. Both stay the same wherever the request runs."""
    if not request.request_id:
        request.request_id = uuid.uuid4().hex
    if not request.sampling.HasField("seed"):
        request.sampling.seed = secrets.randbits(SEED_BITS)


def identity(request: pb.GenerateRequest) -> tuple[tuple[str, str], ...]:
    """The initial metadata that names the id and the seed of `request`."""
    return (REQUEST_ID, request.request_id), (SEED, str(request.sampling.seed))
