"""Spellings of policies. `register` adds further policies: the benchmarks use it for those of other projects."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from planner.policies.base import MAX_CHILDREN, Policy
from planner.policies.fixed import Chain, Eagle2, Off, Static
from planner.policies.smart import Smart, SmartPaper
from treeline.config import MAX_TREE_DEPTH, MAX_TREE_NODES
from treeline.errors import ConfigError

_KNOWN: dict[str, tuple[str, Callable[[list[str]], Policy]]] = {}


def register(name: str, parameters: str, make: Callable[[list[str]], Policy]) -> None:
    """Let `parse_policy` know a policy in this process.

    Args:
        parameters: what follows "name:" in messages, "" if nothing may.
        make: the policy from the comma-separated parameters; raises ValueError or TypeError for wrong ones.
    """
    _KNOWN[name] = parameters, make


def parse_policy(spec: str) -> Policy:
    """The policy that `spec` names.

    Raises:
        ValueError: it names none; the message lists the spellings, and names the nearest.
    """
    name, colon, given = spec.strip().partition(":")
    parameters, make = _KNOWN.get(name, ("", None))
    if make is not None and bool(colon) == bool(parameters):
        try:
            return make(given.split(",") if colon else [])
        except (ValueError, TypeError):
            pass
    close = [] if make else difflib.get_close_matches(name.lower(), _KNOWN, 1)
    raise ValueError(
        f"unknown policy '{spec}': one of {spellings()} (depth to {MAX_TREE_DEPTH}, children to {MAX_CHILDREN})"
        + (f"; did you mean {close[0]}?" if close else "")
    )


def spellings() -> str:
    """Every spelling, for people."""
    return ", ".join(f"{name}:{parameters}" if parameters else name for name, (parameters, _) in _KNOWN.items())


def canonical_spellings(specs: Iterable[str]) -> tuple[str, ...]:
    """Each policy once, in order.

    Raises:
        ConfigError: one of them is no policy.
    """
    try:
        return tuple(dict.fromkeys(parse_policy(spec).spec for spec in specs))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def bounded(value: str, most: int) -> int:
    """A number from 1 to `most`; ValueError otherwise."""
    number = int(value)
    if not 1 <= number <= most:
        raise ValueError
    return number


def _static(parameters: list[str]) -> Policy:
    (shape,) = parameters
    branching = tuple(bounded(part, MAX_CHILDREN) for part in shape.split("-"))
    if len(branching) > MAX_TREE_DEPTH:
        raise ValueError
    return Static(branching)


def _eagle2(parameters: list[str]) -> Policy:
    depth, topk, nodes = parameters
    return Eagle2(bounded(depth, MAX_TREE_DEPTH), bounded(topk, MAX_CHILDREN), bounded(nodes, MAX_TREE_NODES))


register("chain", "K", lambda parameters: Chain(*[bounded(k, MAX_TREE_DEPTH) for k in parameters]))
register("static", "B1-B2-...", _static)
register("eagle2", "DEPTH,TOPK,NODES", _eagle2)
register("off", "", lambda _: Off())
register("smart-paper", "", lambda _: SmartPaper())
register("smart", "", lambda _: Smart())
