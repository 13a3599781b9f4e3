"""The planner's dataclasses as messages, and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

import numpy as np

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
    StepRecord,
    VerifierProfile,
)
from treeline.v1 import planning_pb2 as pb

_SAMPLED, _ACCEPTED = 1, 2
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
    )


def plan_from_proto(message: pb.Plan) -> Plan:
    """Raises ValueError if the calibration has another shape or there is no cost curve."""
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
            verify_scale=cost.verify_scale,
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
    )


def step_to_proto(record: StepRecord) -> pb.StepRecord:
    outcomes = record.outcomes
    flags = outcomes.sampled * np.uint8(_SAMPLED) | outcomes.accepted * np.uint8(_ACCEPTED)
    return pb.StepRecord(
        **{name: getattr(record, name) for name in _SCALARS},
        draft_layer_nodes=record.draft_layer_nodes,
        outcomes=pb.NodeOutcomes(
            sources=outcomes.sources.tobytes(),
            depths=outcomes.depths.tobytes(),
            ranks=outcomes.ranks.tobytes(),
            flags=flags.astype(np.uint8).tobytes(),
            draft_probs=outcomes.draft_probs.tolist(),
        ),
    )


def step_from_proto(message: pb.StepRecord) -> StepRecord:
    """Raises ValueError if the outcomes' columns differ in length."""
    outcomes = message.outcomes
    sources, depths, ranks, flags = (
        np.frombuffer(column, np.uint8)
        for column in (outcomes.sources, outcomes.depths, outcomes.ranks, outcomes.flags)
    )
    draft_probs = np.asarray(outcomes.draft_probs, np.float32)
    if len({len(sources), len(depths), len(ranks), len(flags), len(draft_probs)}) != 1:
        raise ValueError("outcome columns differ in length")
    return StepRecord(
        **{name: getattr(message, name) for name in _SCALARS},
        draft_layer_nodes=tuple(message.draft_layer_nodes),
        outcomes=NodeOutcomes(sources, depths, ranks, (flags & _SAMPLED) > 0, draft_probs, (flags & _ACCEPTED) > 0),
    )


def profile_to_proto(profile: VerifierProfile) -> pb.VerifierProfile:
    return pb.VerifierProfile(
        verify=_curves_to_proto(profile.verify),
        draft_layer_s=profile.draft_layer_s,
        draft_node_s=profile.draft_node_s,
    )


def profile_from_proto(message: pb.VerifierProfile) -> VerifierProfile:
    """Raises ValueError if it holds no curve, or a malformed one."""
    if not message.verify:
        raise ValueError("a profile without a cost curve")
    return VerifierProfile(_curves_from_proto(message.verify), message.draft_layer_s, message.draft_node_s)


def _curves_to_proto(curves: tuple[CostCurve, ...]) -> list[pb.CostCurve]:
    return [pb.CostCurve(**{field.name: getattr(curve, field.name) for field in fields(curve)}) for curve in curves]


def _curves_from_proto(messages: Iterable[pb.CostCurve]) -> tuple[CostCurve, ...]:
    curves = tuple(CostCurve(m.sequences, m.context_tokens, tuple(m.tokens), tuple(m.seconds)) for m in messages)
    for curve in curves:
        if not curve.tokens or len(curve.tokens) != len(curve.seconds):
            raise ValueError("a cost curve without points")
    return curves


def _paper_to_proto(fit: PaperFit | None) -> pb.PaperFit | None:
    return pb.PaperFit(**vars(fit)) if fit else None
