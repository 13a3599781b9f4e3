"""How policies are spelled."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from planner.policies.base import MAX_CHILDREN, MAX_DEPTH, MAX_NODES, Policy
from planner.policies.chains import SglangEma, SmartSpec, VllmAdaptive
from planner.policies.confidence import Eagle2, OptTree
from planner.policies.fixed import Chain, Off, Static
from planner.policies.sequoia import MAX_SEQUOIA_DEPTH, Sequoia
from planner.policies.smart import Smart, SmartPaper
from treeline.errors import ConfigError


def parse_policy(spec: str) -> Policy:
    """The policy that `spec` names.

    Raises:
        ValueError: it names none; the message lists the spellings.
    """
    name, colon, parameters = spec.strip().partition(":")
    try:
        if not colon and name in _PLAIN:
            return _PLAIN[name]()
        if name in _PARAMETERISED:
            return _PARAMETERISED[name][1](parameters)
    except ValueError:
        pass
    raise ValueError(f"unknown policy '{spec}': one of {SPELLINGS} (depth to {MAX_DEPTH}, children to {MAX_CHILDREN})")


def canonical_spellings(specs: Iterable[str]) -> tuple[str, ...]:
    """Each policy once, in order.

    Raises:
        ConfigError: one of them is no policy.
    """
    try:
        return tuple(dict.fromkeys(parse_policy(spec).spec for spec in specs))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _chain(parameters: str) -> Policy:
    return Chain(_bounded(parameters, MAX_DEPTH))


def _static(parameters: str) -> Policy:
    branching = tuple(_bounded(part, MAX_CHILDREN) for part in parameters.split("-"))
    _bounded(len(branching), MAX_DEPTH)
    return Static(branching)


def _eagle2(parameters: str) -> Policy:
    depth, topk, nodes = parameters.split(",")
    return Eagle2(_bounded(depth, MAX_DEPTH), _bounded(topk, MAX_CHILDREN), _bounded(nodes, MAX_NODES))


def _sequoia(parameters: str) -> Policy:
    nodes, depth = parameters.split(",")
    return Sequoia(_bounded(nodes, MAX_NODES), _bounded(depth, MAX_SEQUOIA_DEPTH))


def _opt_tree(parameters: str) -> Policy:
    nodes, depth, *threshold = parameters.split(",")
    if len(threshold) > 1 or (threshold and not 0 <= float(threshold[0]) < 1):
        raise ValueError
    return OptTree(_bounded(nodes, MAX_NODES), _bounded(depth, MAX_DEPTH), *map(float, threshold))


_PLAIN: dict[str, Callable[[], Policy]] = {
    "off": Off,
    "smartspec": SmartSpec,
    "vllm-adaptive": VllmAdaptive,
    "sglang-ema": SglangEma,
    "smart-paper": SmartPaper,
    "smart": Smart,
}
_PARAMETERISED: dict[str, tuple[str, Callable[[str], Policy]]] = {
    "chain": ("K", _chain),
    "static": ("B1-B2-...", _static),
    "sequoia": ("NODES,DEPTH", _sequoia),
    "eagle2": ("DEPTH,TOPK,NODES", _eagle2),
    "opt-tree": ("NODES,DEPTH[,THRESHOLD]", _opt_tree),
}
SPELLINGS = ", ".join([*(f"{name}:{parameters}" for name, (parameters, _) in _PARAMETERISED.items()), *_PLAIN])


def _bounded(value: str | int, most: int) -> int:
    number = int(value)
    if not 1 <= number <= most:
        raise ValueError
    return number
