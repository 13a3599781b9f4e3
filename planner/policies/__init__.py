"""How trees are grown: every policy behind one interface, spelled as a short string (`spellings.py`)."""

from planner.policies.base import Layer, Policy
from planner.policies.spellings import SPELLINGS, canonical_spellings, parse_policy

__all__ = ["SPELLINGS", "Layer", "Policy", "canonical_spellings", "parse_policy"]
