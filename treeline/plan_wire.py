"""The planner's dataclasses as messages, and back."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import fields

import numpy as np

from treeline.bounds import Bounds, check_numbers
from treeline.plan import (
    DEPTHS,
    PROB_BINS,
    SOURCES,
    Calibration,
    CostCurve,
    CostModel,
    NodeOutcomes,
    PaperFit,
    Plan,
    Signal,
    StepRecord,
    VerifierProfile,
)
from treeline.v1 import generation_pb2
from treeline.v1 import planning_pb2 as pb

_SAMPLED, _ACCEPTED = 1, 2
_LEAST_S, _PROBABILITY = 1e-7, (0.0, 1.0)
"""Seconds of any work at least; what is measured faster is no measurement, and its logarithm is far off."""
_LEAST_PROMPT_RATIO = 1 / 32
_MAX_CURVE_POINTS = 1024
"""Of all curves of a profile together: the tracker keeps a covariance of their points, 8 MB by then. We measure 60."""
_MAX_OUTCOMES = 1 << 18
"""Nodes of one step: the largest batch (1024 requests) with the largest trees (256 nodes)."""
_BOUNDS: Bounds = {
    "unix_s": (0, 1e11),
    "created_unix_s": (0, 1e11),
    "lifetime_s": (0, math.inf),  # the built-in plan has no end
    "age_s": (0, math.inf),  # of what was never measured
    "verify_s": (_LEAST_S, 1e6),
    "draft_s": (0, 1e6),
    "step_s": (_LEAST_S, 1e6),
    "seconds": (_LEAST_S, 1e6),
    "verify_scale": (0.01, 100),
    "prompt_ratio": (_LEAST_PROMPT_RATIO, 1 / _LEAST_PROMPT_RATIO),
    "delta": (0, 200),
    "rho": (0, 200),
    "acceptance": _PROBABILITY,
    "kappa": _PROBABILITY,
    "draft_probs": _PROBABILITY,
    "sequences": (1, 1024),  # limits.max_running_requests
    "running": (0, 1024),
    "tokens": (1, 1 << 19),  # twice the largest batch with the largest trees; sizes the arrays that curves are read to
    "prefill_tokens": (0, 1 << 19),
    "gap_tokens": (1, 1 << 10),
    "max_nodes": (0, 256),  # limits.max_tree_nodes
    "max_depth": (0, 32),  # limits.max_tree_depth
}
"""Of every number that sizes an array, is divided by, or whose logarithm is taken."""
_SCALARS = (
    "step_id",
    "unix_s",
    "plan_version",
    "sequences",
    "tokens",
    "prefill_tokens",
    "context_tokens",
    "drafted_nodes",
    "verified_nodes",
    "accepted_nodes",
    "emitted_tokens",
    "running",
    "waiting",
    "free_slots",
    "draft_s",
    "drafter_s",
    "verify_s",
    "predicted_verify_s",
    "step_s",
    "goodput",
    "price",
    "catch_up_tokens",
    "node_s",
    "drafted_requests",
    "pass_how",
)


def plan_to_proto(plan: Plan) -> pb.Plan:
    cost = plan.cost
    return pb.Plan(
        version=plan.version,
        created_unix_s=plan.created_unix_s,
        lifetime_s=plan.lifetime_s,
        cost=pb.CostModel(
            verify=_curves_to_proto(cost.verify),
            verify_scale=cost.verify_scale,
            draft_round_trip_s=cost.draft_round_trip_s,
            draft_sequence_s=cost.draft_sequence_s,
            draft_layer_s=cost.draft_layer_s,
            draft_node_s=cost.draft_node_s,
            step_overhead_s=cost.step_overhead_s,
            node_s=cost.node_s,
            prompt_ratio=cost.prompt_ratio,
            paper=_paper_to_proto(cost.paper),
        ),
        calibration=pb.Calibration(
            acceptance=plan.calibration.acceptance.ravel().tolist(),
            kappa=plan.calibration.kappa.ravel().tolist(),
        ),
        price=plan.price,
        max_nodes=plan.max_nodes,
        max_depth=plan.max_depth,
        reason=plan.reason,
        step_budget_s=plan.step_budget_s if math.isfinite(plan.step_budget_s) else 0.0,
        wait_factor=plan.wait_factor,
        signals=_signals_to_proto(plan.signals),
    )


def plan_from_proto(message: pb.Plan) -> Plan:
    """Raises ValueError if a number is out of range, the calibration has another shape or there is no cost curve."""
    check_numbers(message, _BOUNDS)
    cost, calibration = message.cost, message.calibration
    paper = cost.paper
    if not cost.verify:
        raise ValueError("a plan without a cost curve")
    return Plan(
        version=message.version,
        created_unix_s=message.created_unix_s,
        lifetime_s=message.lifetime_s,
        cost=CostModel(
            verify=_curves_from_proto(cost.verify),
            verify_scale=cost.verify_scale or 1.0,
            draft_round_trip_s=cost.draft_round_trip_s,
            draft_sequence_s=cost.draft_sequence_s,
            draft_layer_s=cost.draft_layer_s,
            draft_node_s=cost.draft_node_s,
            step_overhead_s=cost.step_overhead_s,
            node_s=cost.node_s,
            prompt_ratio=cost.prompt_ratio or 1.0,  # a planner that does not know it says nothing
            paper=PaperFit(paper.lambda_s, paper.gamma_s, paper.delta, paper.rho) if cost.HasField("paper") else None,
        ),
        calibration=Calibration(
            np.asarray(calibration.acceptance, np.float32).reshape(SOURCES, 2, DEPTHS, PROB_BINS),
            np.asarray(calibration.kappa, np.float32).reshape(2, DEPTHS),
        ),
        price=message.price,
        max_nodes=message.max_nodes,
        max_depth=message.max_depth,
        reason=message.reason,
        step_budget_s=message.step_budget_s or math.inf,
        wait_factor=message.wait_factor or 1.0,
        signals=tuple(_signal_from_proto(signal) for signal in message.signals),
    )


def step_to_proto(record: StepRecord) -> pb.StepRecord:
    outcomes = record.outcomes
    flags = outcomes.sampled * np.uint8(_SAMPLED) | outcomes.accepted * np.uint8(_ACCEPTED)
    return pb.StepRecord(
        **{name: getattr(record, name) for name in _SCALARS},
        draft_layer_nodes=record.draft_layer_nodes,
        gap_s=[seconds for seconds, _ in record.gaps],
        gap_tokens=[tokens for _, tokens in record.gaps],
        first_token_s=record.first_token_s,
        outcomes=pb.NodeOutcomes(
            sources=outcomes.sources.tobytes(),
            depths=outcomes.depths.tobytes(),
            ranks=outcomes.ranks.tobytes(),
            flags=flags.astype(np.uint8).tobytes(),
            draft_probs=outcomes.draft_probs.tolist(),
        ),
    )


def step_from_proto(message: pb.StepRecord) -> StepRecord:
    """Raises ValueError if a number is out of range, or the outcomes' or gaps' columns differ in length."""
    check_numbers(message, _BOUNDS)
    if not message.step_s or message.prefill_tokens > message.tokens or message.sequences > message.tokens:
        raise ValueError("a step without seconds, or with fewer tokens than sequences or prompt tokens")
    if message.drafter_s and message.draft_s < _LEAST_S:
        raise ValueError("the drafter worked in no time")
    outcomes = message.outcomes
    sources, depths, ranks, flags = (
        np.frombuffer(column, np.uint8)
        for column in (outcomes.sources, outcomes.depths, outcomes.ranks, outcomes.flags)
    )
    draft_probs = np.asarray(outcomes.draft_probs, np.float32)
    if len({len(sources), len(depths), len(ranks), len(flags), len(draft_probs)}) != 1:
        raise ValueError("outcome columns differ in length")
    if len(sources) > _MAX_OUTCOMES or (sources >= SOURCES).any() or not depths.all():
        raise ValueError("an outcome of no source or depth, or too many outcomes")
    return StepRecord(
        **{name: getattr(message, name) for name in _SCALARS},
        draft_layer_nodes=tuple(message.draft_layer_nodes),
        gaps=tuple(zip(message.gap_s, message.gap_tokens, strict=True)),
        first_token_s=tuple(message.first_token_s),
        outcomes=NodeOutcomes(sources, depths, ranks, (flags & _SAMPLED) > 0, draft_probs, (flags & _ACCEPTED) > 0),
    )


def profile_to_proto(profile: VerifierProfile) -> pb.VerifierProfile:
    return pb.VerifierProfile(
        verify=_curves_to_proto(profile.verify),
        draft_layer_s=profile.draft_layer_s,
        draft_node_s=profile.draft_node_s,
    )


def profile_from_proto(message: pb.VerifierProfile) -> VerifierProfile:
    """Raises ValueError if it holds no curve, or a malformed one, or a number is out of range."""
    check_numbers(message, _BOUNDS)
    if not message.verify:
        raise ValueError("a profile without a cost curve")
    return VerifierProfile(_curves_from_proto(message.verify), message.draft_layer_s, message.draft_node_s)


def plan_summary(plan: Plan) -> generation_pb2.VerifierPlan:
    """What clients may see of a plan."""
    return generation_pb2.VerifierPlan(
        version=plan.version,
        reason=plan.reason,
        price=plan.price,
        step_budget_s=plan.step_budget_s if math.isfinite(plan.step_budget_s) else None,
        wait_factor=plan.wait_factor,
        max_nodes=plan.max_nodes,
        max_depth=plan.max_depth,
        signals=_signals_to_proto(plan.signals),
        age_s=time.time() - plan.created_unix_s if plan.version else 0.0,
    )


def _signals_to_proto(signals: Iterable[Signal]) -> list[generation_pb2.PlanSignal]:
    return [generation_pb2.PlanSignal(**vars(signal)) for signal in signals]


def _signal_from_proto(message: generation_pb2.PlanSignal) -> Signal:
    return Signal(
        message.name,
        message.value_s if message.HasField("value_s") else None,
        message.objective_s if message.HasField("objective_s") else None,
        message.age_s,
        message.source,
    )


def _curves_to_proto(curves: tuple[CostCurve, ...]) -> list[pb.CostCurve]:
    return [pb.CostCurve(**{field.name: getattr(curve, field.name) for field in fields(curve)}) for curve in curves]


def _curves_from_proto(messages: Iterable[pb.CostCurve]) -> tuple[CostCurve, ...]:
    curves = tuple(CostCurve(m.sequences, m.context_tokens, tuple(m.tokens), tuple(m.seconds)) for m in messages)
    for curve in curves:
        if not curve.sequences or not curve.tokens or len(curve.tokens) != len(curve.seconds):
            raise ValueError("a cost curve without points or sequences")
        if (np.diff(curve.tokens) <= 0).any() or (np.diff(curve.seconds) < 0).any():
            raise ValueError("a cost curve that falls")
    if sum(len(curve.tokens) for curve in curves) > _MAX_CURVE_POINTS:
        raise ValueError(f"cost curves of more than {_MAX_CURVE_POINTS} points")
    return curves


def _paper_to_proto(fit: PaperFit | None) -> pb.PaperFit | None:
    return pb.PaperFit(**vars(fit)) if fit else None
