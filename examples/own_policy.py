"""A policy of one's own: a chain that ends where the drafter becomes unsure.

A server knows it once this module has been imported in its processes; requests then say `policy="sure-chain:0.4"`.
Text never depends on the policy, only speed does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.policies import Layer, Policy
from planner.policies.base import places_by_score
from planner.policies.parse import register
from treeline.plan import Plan


@dataclass(frozen=True)
class SureChain(Policy):
    """The likeliest token, again and again, while the path's calibrated acceptance is at least `least`."""

    least: float
    max_depth = 16
    max_children = 1

    @property
    def spec(self) -> str:
        return f"sure-chain:{self.least:g}"

    def keep(self, layer: Layer, plan: Plan) -> NDArray[np.bool_]:
        return (places_by_score(layer.scores, layer.tree_of) < 1) & (layer.scores >= self.least)


register("sure-chain", "LEAST", lambda parameters: SureChain(*map(float, parameters)))
