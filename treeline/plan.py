"""The plan: all that the fast path needs to price a node, published by the planner and valid for a limited time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from treeline.config import MAX_RUNNING_REQUESTS, MAX_TREE_DEPTH, MAX_TREE_NODES
from treeline.messages import Bounds, check_numbers, from_message, to_message
from treeline.v1 import generation_pb2
from treeline.v1 import planning_pb2 as pb

SOURCES, DEPTHS, PROB_BINS = 2, 8, 16
"""Axes of the calibration: `treeline.forest.Source`; depth (the last one holds all deeper; `limits.max_tree_depth` is 8
by default); bin of the draft probability. At this size a cell in use sees a few nodes per step."""


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
        """float64 [n] each: `tokens` and `seconds`."""
        return np.asarray(self.tokens, np.float64), np.asarray(self.seconds, np.float64)


@dataclass(frozen=True)
class PaperFit:
    """SMART's own cost fit (arXiv 2604.09731): draft = lambda * n, verify = gamma * (exp(delta * n ** rho) - 1)."""

    lambda_s: float
    gamma_s: float
    delta: float
    rho: float


CurveReading = tuple[int, NDArray[np.float64], NDArray[np.float64]]
"""(shortest context, float64 [n], float64 [n]): seconds of passes over 0 .. n - 1 tokens at that context, and
the seconds that each further context token per sequence adds."""


@dataclass(frozen=True)
class CostModel:
    """What a step costs, in seconds.

    Attributes:
        verify: curves of the profile, at least one.
        verify_scale: online correction, multiplies every curve.
        draft_round_trip_s: r, to the drafter and back, once per step.
        draft_sequence_s: per drafted request, whatever its tree: messages, prompt lookup, pruning.
        draft_layer_s: d0, per tree layer.
        draft_node_s: d1, per node of a layer.
        step_overhead_s: C_step, the part of a step without trees that is not verification.
        lookup_s: what trees from prompt lookup alone add to it.
        node_s: recent threshold for verifying a node: the gain of the best one left out, in seconds at the price.
        prompt_ratio: cost of a prompt token over that of a decoded one, which needs logits.
        paper: the fit of the `smart-paper` policy, if there is one.
    """

    verify: tuple[CostCurve, ...]
    verify_scale: float = 1.0
    draft_round_trip_s: float = 0.0
    draft_sequence_s: float = 0.0
    draft_layer_s: float = 0.0
    draft_node_s: float = 0.0
    step_overhead_s: float = 0.0
    lookup_s: float = 0.0
    node_s: float = 0.0
    prompt_ratio: float = 1.0
    paper: PaperFit | None = None

    @cached_property
    def readings(self) -> dict[tuple[int, int], CurveReading]:
        """Cache of `planner.fast.cost` by (sequences, n): every step reads the curves."""
        return {}

    @cached_property
    def curve_readings(self) -> dict[tuple[int, int], NDArray[np.float64]]:
        """Cache of single curves by (index in `verify`, n), shared by batches of all sizes."""
        return {}


@dataclass(frozen=True)
class Calibration:
    """From a drafter's probability to the probability that the target accepts.

    Attributes:
        acceptance: float32 [SOURCES, 2, DEPTHS, PROB_BINS]: P(accepted | parent accepted), by source, sampled or
            greedy (0 greedy), depth - 1 (the last one holds all deeper) and draft-probability bin.
        kappa: float32 [2, DEPTHS]: total acceptance of the children kept under an accepted node, by sampled and the
            node's depth (0 is the root).
    """

    acceptance: NDArray[np.float32]
    kappa: NDArray[np.float32]


@dataclass(frozen=True)
class Signal:
    """A measurement that a plan rests on.

    Attributes:
        name: "inter_token_p95" or "time_to_first_token_p95".
        value_s: None if there is no recent measurement.
        objective_s: the operator's objective, if there is one.
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
    """The basis of decisions of one verifier and its drafter.

    Attributes:
        version: grows by one with each plan of a planner.
        created_unix_s: when it was made.
        lifetime_s: after this long without a newer plan, the built-in conservative plan takes over.
        price: R + mu * Q in tokens per second: a node must gain this many tokens per second of its cost.
        max_nodes: most draft nodes per request.
        max_depth: deepest draft layer.
        reason: one line for people: why the plan is as it is.
        step_budget_s: longest step that trees and prompt chunks may cause; plain decoding is always allowed.
        wait_factor: factor on the cost of a waiting request; at least 1.
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
class VerifierProfile:
    """Seconds of passes of several sizes on this device, measured before the first request.

    Attributes:
        verify: curves over tokens, one per region of batch and context.
        draft_layer_s, draft_node_s: d0 and d1 as the drafter measured them; 0 if it runs no model.
    """

    verify: tuple[CostCurve, ...]
    draft_layer_s: float = 0.0
    draft_node_s: float = 0.0


MAX_PASS_TOKENS = 2 * MAX_RUNNING_REQUESTS * MAX_TREE_NODES
"""Tokens of one pass: twice the largest batch with the largest trees. It sizes the arrays that curves are read into."""
MIN_SECONDS = 1e-7
"""A shorter time is a failed measurement: its logarithm would be far off."""
MAX_CURVE_POINTS = 1024
"""Points of all curves of a profile together: the tracker's covariance of them takes 8 MB. A real profile has 60."""
_MAX_PROMPT_RATIO = 32.0
"""A prompt token and a decoded one differ by less: 0.6 to 1.0 was measured (docs/decisions.md)."""
_BOUNDS: Bounds = {
    "created_unix_s": (0, 1e11),
    "lifetime_s": (0, math.inf),  # the built-in plan never expires
    "step_budget_s": (0, math.inf),  # there may be none
    "age_s": (0, math.inf),  # infinite if never measured
    "seconds": (MIN_SECONDS, 1e6),
    "verify_scale": (0.01, 100),
    "prompt_ratio": (1 / _MAX_PROMPT_RATIO, _MAX_PROMPT_RATIO),
    "delta": (0, 200),
    "rho": (0, 200),
    "acceptance": (0, 1),
    "kappa": (0, 1),
    "sequences": (1, MAX_RUNNING_REQUESTS),
    "tokens": (1, MAX_PASS_TOKENS),
    "max_nodes": (0, MAX_TREE_NODES),
    "max_depth": (0, MAX_TREE_DEPTH),
}
"""Bounds of every number that sizes an array, is a divisor, or has its logarithm taken."""


def plan_to_proto(plan: Plan) -> pb.Plan:
    paper = plan.cost.paper
    return to_message(
        plan,
        pb.Plan,
        cost=to_message(
            plan.cost,
            pb.CostModel,
            verify=_curves_to_proto(plan.cost.verify),
            paper=to_message(paper, pb.PaperFit) if paper else None,
        ),
        calibration=pb.Calibration(
            acceptance=plan.calibration.acceptance.ravel().tolist(),
            kappa=plan.calibration.kappa.ravel().tolist(),
        ),
        signals=_signals_to_proto(plan.signals),
    )


def plan_from_proto(message: pb.Plan) -> Plan:
    """Raises ValueError if a number is out of range, the calibration has another shape or there is no cost curve."""
    check_numbers(message, _BOUNDS)
    cost, calibration = message.cost, message.calibration
    if not cost.verify:
        raise ValueError("a plan without a cost curve")
    return from_message(
        message,
        Plan,
        cost=from_message(
            cost,
            CostModel,
            verify=_curves_from_proto(cost.verify),
            paper=from_message(cost.paper, PaperFit) if cost.HasField("paper") else None,
        ),
        calibration=Calibration(
            np.asarray(calibration.acceptance, np.float32).reshape(SOURCES, 2, DEPTHS, PROB_BINS),
            np.asarray(calibration.kappa, np.float32).reshape(2, DEPTHS),
        ),
        signals=tuple(from_message(signal, Signal) for signal in message.signals),
    )


def profile_to_proto(profile: VerifierProfile) -> pb.VerifierProfile:
    return to_message(profile, pb.VerifierProfile, verify=_curves_to_proto(profile.verify))


def profile_from_proto(message: pb.VerifierProfile) -> VerifierProfile:
    """Raises ValueError if there is no curve, a curve is malformed or a number is out of range."""
    check_numbers(message, _BOUNDS)
    if not message.verify:
        raise ValueError("a profile without a cost curve")
    return from_message(message, VerifierProfile, verify=_curves_from_proto(message.verify))


def plan_summary(plan: Plan) -> generation_pb2.VerifierPlan:
    """The part of a plan that clients may see."""
    return to_message(
        plan,
        generation_pb2.VerifierPlan,
        step_budget_s=plan.step_budget_s if math.isfinite(plan.step_budget_s) else None,
        signals=_signals_to_proto(plan.signals),
        age_s=time.time() - plan.created_unix_s if plan.version else 0.0,
    )


def _signals_to_proto(signals: Iterable[Signal]) -> list[generation_pb2.PlanSignal]:
    return [to_message(signal, generation_pb2.PlanSignal) for signal in signals]


def _curves_to_proto(curves: Iterable[CostCurve]) -> list[pb.CostCurve]:
    return [to_message(curve, pb.CostCurve) for curve in curves]


def _curves_from_proto(messages: Iterable[pb.CostCurve]) -> tuple[CostCurve, ...]:
    curves = tuple(from_message(message, CostCurve) for message in messages)
    for curve in curves:
        if not curve.sequences or not curve.tokens or len(curve.tokens) != len(curve.seconds):
            raise ValueError("a cost curve without points or sequences")
        if (np.diff(curve.tokens) <= 0).any() or (np.diff(curve.seconds) < 0).any():
            raise ValueError("a cost curve that falls")
    if sum(len(curve.tokens) for curve in curves) > MAX_CURVE_POINTS:
        raise ValueError(f"cost curves of more than {MAX_CURVE_POINTS} points")
    return curves
