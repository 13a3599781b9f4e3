"""The plan: all that the fast path needs to price a node, published by the planner and good for a limited time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

SOURCES = 3
DEPTHS = 8
PROB_BINS = 16


@dataclass(frozen=True)
class CostCurve:
    """Measured seconds of one verification pass over tokens, for one region of batch and context.

    Attributes:
        sequences: sequences in the pass.
        context_tokens: mean committed tokens per sequence.
        tokens: increasing token counts.
        seconds: non-decreasing seconds, one per token count; steps are kept, not smoothed.
    """

    sequences: int
    context_tokens: int
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    @cached_property
    def points(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """float64 [n] each: `tokens` and `seconds`, to be read off."""
        return np.asarray(self.tokens, np.float64), np.asarray(self.seconds, np.float64)


@dataclass(frozen=True)
class PaperFit:
    """SMART's own cost fit (arXiv 2604.09731): draft = lambda * n, verify = gamma * (exp(delta * n ** rho) - 1)."""

    lambda_s: float
    gamma_s: float
    delta: float
    rho: float


Reading = tuple[int, NDArray[np.float64], NDArray[np.float64]]
"""(shortest context, float64 [n], float64 [n]): seconds of passes over 0 .. n - 1 tokens at that context, and what each
context token per sequence beyond it adds."""


@dataclass(frozen=True)
class CostModel:
    """What a step costs, in seconds.

    Attributes:
        verify: curves of the profile, at least one.
        verify_scale: online correction, multiplies every curve.
        draft_round_trip_s: r, the way to the drafter and back, once a step.
        draft_sequence_s: what drafting takes per request whatever its tree: messages, lookups, pruning.
        draft_layer_s: d0, one more tree layer.
        draft_node_s: d1, one more node in a layer.
        step_overhead_s: C_step, all of a step that is neither drafting nor verification.
        node_s: what one more verified node has been worth lately: the best one left out, as seconds at the price.
        prompt_ratio: what a prompt's token costs, by what a decoded one does: it needs no logits.
        paper: the fit used by the `smart-paper` policy, if there is one.
    """

    verify: tuple[CostCurve, ...]
    verify_scale: float = 1.0
    draft_round_trip_s: float = 0.0
    draft_sequence_s: float = 0.0
    draft_layer_s: float = 0.0
    draft_node_s: float = 0.0
    step_overhead_s: float = 0.0
    node_s: float = 0.0
    prompt_ratio: float = 1.0
    paper: PaperFit | None = None

    @cached_property
    def readings(self) -> dict[tuple[int, int], Reading]:
        """What `planner.fast.cost` has read off the curves, by (sequences, n): every step asks again."""
        return {}

    @cached_property
    def curve_readings(self) -> dict[tuple[int, int], NDArray[np.float64]]:
        """Each curve by itself, by (its place among `verify`, n): batches of all sizes are read off the same ones."""
        return {}


@dataclass(frozen=True)
class Calibration:
    """From a drafter's probability to the probability that the target accepts.

    Attributes:
        acceptance: float32 [SOURCES, 2, DEPTHS, PROB_BINS]: P(accepted | parent accepted), by source, sampled or
            greedy (0 greedy), depth - 1 (the last one holds all deeper) and draft-probability bin.
        kappa: float32 [2, DEPTHS]: total acceptance of the children that one would keep under an accepted node, by
            sampled and the node's depth (0 is the root).
    """

    acceptance: NDArray[np.float32]
    kappa: NDArray[np.float32]


@dataclass(frozen=True)
class Signal:
    """A measurement that a plan rests on.

    Attributes:
        name: "inter_token_p95" or "time_to_first_token_p95".
        value_s: None while nothing fresh was measured.
        objective_s: what the operator asked for, if anything.
        age_s: seconds since it was measured; infinite if it never was.
        source: "prometheus" or "steps", the verifier's own step records.
    """

    name: str
    value_s: float | None
    objective_s: float | None
    age_s: float
    source: str


@dataclass(frozen=True)
class Plan:
    """One published decision basis for one verifier and its drafter.

    Attributes:
        version: grows by one with each plan of a planner.
        created_unix_s: when it was made.
        lifetime_s: after this long without a newer plan, the built-in conservative plan takes over.
        price: R + mu * Q in tokens per second: a node must bring this many tokens per second of its cost.
        max_nodes: most draft nodes per request.
        max_depth: deepest draft layer.
        reason: one line for people: why the plan is as it is.
        step_budget_s: longest step that trees and prompt chunks may make; plain decoding is always allowed.
        wait_factor: how many times its ordinary price a waiting request costs; at least 1.
        signals: the measurements behind budget and factor.
    """

    version: int
    created_unix_s: float
    lifetime_s: float
    cost: CostModel
    calibration: Calibration
    price: float
    max_nodes: int
    max_depth: int
    reason: str = ""
    step_budget_s: float = math.inf
    wait_factor: float = 1.0
    signals: tuple[Signal, ...] = ()


@dataclass(frozen=True)
class NodeOutcomes:
    """Verified nodes whose parent was accepted: the only ones whose acceptance was observed. Columns of equal length.

    Attributes:
        sources, depths, ranks: uint8 [k].
        sampled, accepted: bool [k].
        draft_probs: float32 [k].
    """

    sources: NDArray[np.uint8]
    depths: NDArray[np.uint8]
    ranks: NDArray[np.uint8]
    sampled: NDArray[np.bool_]
    draft_probs: NDArray[np.float32]
    accepted: NDArray[np.bool_]

    @staticmethod
    def empty() -> NodeOutcomes:
        return _NO_OUTCOMES


_BYTES, _BOOLS = np.zeros(0, np.uint8), np.zeros(0, np.bool_)
_NO_OUTCOMES = NodeOutcomes(_BYTES, _BYTES, _BYTES, _BOOLS, np.zeros(0, np.float32), _BOOLS)


@dataclass(frozen=True)
class StepRecord:
    """What one engine step did and cost; the planner learns from nothing else.

    Attributes:
        sequences: decoding requests verified in the step.
        tokens: tokens of the verification pass, prefill included.
        prefill_tokens: prompt tokens among them.
        context_tokens: committed tokens of all sequences together.
        drafted_nodes, verified_nodes, accepted_nodes: draft nodes at each stage, over the batch.
        emitted_tokens: tokens given to requests.
        running, waiting: requests when the step began.
        free_slots: sequences that could still be admitted (slots and blocks).
        draft_s: seconds that drafting took in all: messages, waiting for the drafter, pruning.
        drafter_s: seconds the drafter itself worked.
        draft_layer_nodes: nodes run per layer of the draft model.
        verify_s: seconds of the verification pass and sampling.
        predicted_verify_s: what the plan's cost model said of this pass before it ran.
        step_s: seconds of the whole step.
        goodput: weighted tokens per second this step was expected to bring at the chosen size, 0 if undrafted.
        price: R + mu * Q of this step, tokens per second, 0 if undrafted.
        node_s: worth of the best node that was drafted and not verified, as seconds at the price; 0 if there was none.
        catch_up_tokens: what the drafter ran to bring its cache up to date; where they are many, the step does not
            teach draft costs.
        drafted_requests: requests that the drafter was asked to draft for.
        pass_how: how the verification pass ran: "replayed" (a captured CUDA graph), "eager" (the same, uncaptured), or
            "packed" (without padding; the only way on a CPU).
        gaps: (seconds, tokens) per request that got tokens behind its first one: since when it waited, how many came.
        first_token_s: per request that got its first token: seconds from its arrival.
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
    free_slots: int
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


@dataclass(frozen=True)
class VerifierProfile:
    """Measured at start, before the first request: what passes of several sizes take on this device.

    Attributes:
        verify: curves over tokens, one per region of batch and context.
        draft_layer_s, draft_node_s: the drafter's own measurement of d0 and d1; zero if it runs no model.
    """

    verify: tuple[CostCurve, ...]
    draft_layer_s: float = 0.0
    draft_node_s: float = 0.0
