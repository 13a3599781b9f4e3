"""The record of an engine step, the only thing that the planner learns from; with its codec."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeline.config import MAX_RUNNING_REQUESTS, MAX_TREE_NODES
from treeline.messages import Bounds, check_numbers, from_message, to_message
from treeline.plan import MAX_PASS_TOKENS, MIN_SECONDS, SOURCES
from treeline.request import MAX_PRIORITY
from treeline.v1 import planning_pb2 as pb


@dataclass(frozen=True)
class NodeOutcomes:
    """Verified nodes whose parent was accepted: only their acceptance is observed. Columns of equal length.

    Attributes:
        sources, depths: uint8 [k].
        first: bool [k]; whether the node is its parent's first verified child: the drafter's likeliest one.
        sampled, accepted: bool [k].
        draft_probs: float32 [k].
    """

    sources: NDArray[np.uint8]
    depths: NDArray[np.uint8]
    first: NDArray[np.bool_]
    sampled: NDArray[np.bool_]
    draft_probs: NDArray[np.float32]
    accepted: NDArray[np.bool_]

    @staticmethod
    def empty() -> NodeOutcomes:
        return _NO_OUTCOMES


_BYTES, _BOOLS = np.zeros(0, np.uint8), np.zeros(0, np.bool_)
_NO_OUTCOMES = NodeOutcomes(_BYTES, _BYTES, _BOOLS, _BOOLS, np.zeros(0, np.float32), _BOOLS)


@dataclass(frozen=True)
class StepRecord:
    """What one engine step did and cost.

    Attributes:
        sequences: decoding requests verified in the step.
        tokens: tokens of the verification pass, prefill included.
        prefill_tokens: prompt tokens among them.
        context_tokens: committed tokens of all sequences together.
        drafted_nodes, verified_nodes, accepted_nodes: draft nodes at each stage, over the batch.
        emitted_tokens: tokens given to requests.
        running: requests with a slot: those that decode, and those still in prefill.
        waiting: requests without a slot.
        startable: requests whose prompts found no room in this step and could start in the next.
        draft_s: seconds of drafting: messages, waiting for the drafter, pruning.
        drafter_s: seconds by the drafter's own clock.
        draft_layer_nodes: nodes run per layer of the draft model.
        verify_s: seconds of the verification pass and sampling.
        predicted_verify_s: the plan's prediction of `verify_s`.
        step_s: seconds of the whole step.
        goodput: weighted tokens per second expected at the chosen size; 0 if undrafted.
        price: R + mu * Q of this step, tokens per second; 0 if undrafted.
        node_s: gain of the best drafted node that was not verified, in seconds at the price; 0 if there was none.
        catch_up_tokens: committed tokens that the drafter ran to bring its cache up to date.
        drafted_requests: requests that were drafted for.
        pass_how: how the verification pass ran: "replayed" (a captured CUDA graph), "eager" (the same, uncaptured),
            "packed" (without padding), or "native" (on a CPU).
        gaps: (seconds since its last tokens, tokens) for each request that received further tokens.
        first_token_s: seconds from its arrival for each request that received its first token.
        gap_priority, first_token_priority: priorities of these requests; empty if all are 0.
        preempted: requests that lost their KV blocks to others, and wait to be recomputed.
    """

    step_id: int
    unix_s: float
    plan_version: int
    sequences: int
    tokens: int
    prefill_tokens: int
    context_tokens: int
    drafted_nodes: int
    verified_nodes: int
    accepted_nodes: int
    emitted_tokens: int
    running: int
    waiting: int
    startable: int
    draft_s: float
    drafter_s: float
    draft_layer_nodes: tuple[int, ...]
    verify_s: float
    predicted_verify_s: float
    step_s: float
    goodput: float
    price: float
    outcomes: NodeOutcomes = field(default_factory=NodeOutcomes.empty)
    catch_up_tokens: int = 0
    node_s: float = 0.0
    drafted_requests: int = 0
    pass_how: str = ""
    gaps: tuple[tuple[float, int], ...] = ()
    first_token_s: tuple[float, ...] = ()
    preempted: int = 0
    gap_priority: tuple[int, ...] = ()
    first_token_priority: tuple[int, ...] = ()


_SAMPLED, _ACCEPTED, _FIRST = 1, 2, 4
"""Bits of the wire's `flags`."""
_MAX_OUTCOMES = MAX_RUNNING_REQUESTS * MAX_TREE_NODES
_BOUNDS: Bounds = {
    "unix_s": (0, 1e11),
    "verify_s": (MIN_SECONDS, 1e6),
    "step_s": (MIN_SECONDS, 1e6),
    "draft_probs": (0, 1),
    "sequences": (1, MAX_RUNNING_REQUESTS),
    "running": (0, MAX_RUNNING_REQUESTS),
    "tokens": (1, MAX_PASS_TOKENS),
    "prefill_tokens": (0, MAX_PASS_TOKENS),
    "gap_tokens": (1, 1 << 10),
    "gap_priority": (-MAX_PRIORITY, MAX_PRIORITY),
    "first_token_priority": (-MAX_PRIORITY, MAX_PRIORITY),
}
"""Bounds of every number that sizes an array, is a divisor, or has its logarithm taken."""


def step_to_proto(record: StepRecord) -> pb.StepRecord:
    outcomes = record.outcomes
    flags = outcomes.sampled * _SAMPLED | outcomes.accepted * _ACCEPTED | outcomes.first * _FIRST
    return to_message(
        record,
        pb.StepRecord,
        gap_s=[seconds for seconds, _ in record.gaps],
        gap_tokens=[tokens for _, tokens in record.gaps],
        outcomes=pb.NodeOutcomes(
            sources=outcomes.sources.tobytes(),
            depths=outcomes.depths.tobytes(),
            flags=flags.astype(np.uint8).tobytes(),
            draft_probs=outcomes.draft_probs.tolist(),
        ),
    )


def step_from_proto(message: pb.StepRecord) -> StepRecord:
    """Raises ValueError if a number is out of range, or the outcomes' or gaps' columns differ in length."""
    check_numbers(message, _BOUNDS)
    if not message.step_s or message.prefill_tokens > message.tokens or message.sequences > message.tokens:
        raise ValueError("a step without seconds, or with fewer tokens than sequences or prompt tokens")
    if message.drafter_s and message.draft_s < MIN_SECONDS:
        raise ValueError("the drafter worked for no time")
    for priorities, of in (
        (message.gap_priority, message.gap_s),
        (message.first_token_priority, message.first_token_s),
    ):
        if len(priorities) not in (0, len(of)):
            raise ValueError("not one priority for each request")
    outcomes = message.outcomes
    columns = (outcomes.sources, outcomes.depths, outcomes.flags)
    sources, depths, flags = (np.frombuffer(column, np.uint8) for column in columns)
    draft_probs = np.asarray(outcomes.draft_probs, np.float32)
    if len({len(sources), len(depths), len(flags), len(draft_probs)}) != 1:
        raise ValueError("outcome columns differ in length")
    if len(sources) > _MAX_OUTCOMES or (sources >= SOURCES).any() or not depths.all():
        raise ValueError("an outcome with an unknown source or depth 0, or too many outcomes")
    sampled, accepted, first = ((flags & bit) > 0 for bit in (_SAMPLED, _ACCEPTED, _FIRST))
    return from_message(
        message,
        StepRecord,
        gaps=tuple(zip(message.gap_s, message.gap_tokens, strict=True)),
        outcomes=NodeOutcomes(sources, depths, first, sampled, draft_probs, accepted),
    )
