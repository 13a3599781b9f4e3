"""How trees grow: every policy behind one interface, spelled as a short string (`parse.py`)."""

from planner.policies.base import Layer, Policy
from planner.policies.parse import canonical_spellings, parse_policy, spellings

__all__ = ["Layer", "Policy", "canonical_spellings", "parse_policy", "spellings"]
