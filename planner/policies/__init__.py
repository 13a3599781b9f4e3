"""How trees are grown: every policy behind one interface, spelled as a short string (`spellings.py`)."""

from planner.policies.base import Layer, Policy
from planner.policies.spellings import SPELLINGS, parse_policy

__all__ = ["SPELLINGS", "Layer", "Policy", "parse_policy"]
