"""Recorded steps: what was drafted and what became of it, for simulations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.sweep import Result
from treeline.plan import StepRecord


def write_trace(path: Path, result: Result) -> None:
    """One JSON line more for each step of a block."""
    block = result.block
    where = {"policy": block.policy, "loop": block.loop, "load": block.load, "round": block.round}
    with path.open("a") as file:
        file.writelines(json.dumps({**where, **_step(step.record)}) + "\n" for step in result.steps)


def _step(record: StepRecord) -> dict[str, Any]:
    """A step and, in columns, its verified nodes whose parent was accepted: of others nobody knows."""
    outcomes = record.outcomes
    return {
        "step_id": record.step_id,
        "unix_s": record.unix_s,
        "sequences": record.sequences,
        "tokens": record.tokens,
        "prefill_tokens": record.prefill_tokens,
        "context_tokens": record.context_tokens,
        "drafted_nodes": record.drafted_nodes,
        "verified_nodes": record.verified_nodes,
        "accepted_nodes": record.accepted_nodes,
        "emitted_tokens": record.emitted_tokens,
        "draft_layer_nodes": list(record.draft_layer_nodes),
        "draft_s": record.draft_s,
        "verify_s": record.verify_s,
        "step_s": record.step_s,
        "outcomes": {
            "depth": outcomes.depths.tolist(),
            "rank": outcomes.ranks.tolist(),
            "source": outcomes.sources.tolist(),
            "prob": [round(p, 6) for p in outcomes.draft_probs.tolist()],
            "sampled": outcomes.sampled.tolist(),
            "accepted": outcomes.accepted.tolist(),
        },
    }
