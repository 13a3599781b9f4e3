"""Imports go only downwards through the rooms of the house."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "treeline": set(),
    "planner": {"treeline"},
    "lm": {"treeline"},
    "distill": {"lm", "treeline"},
    "drafter_svc": {"lm", "planner", "treeline"},
    "verifier_svc": {"lm", "planner", "treeline"},
    "front_door": {"treeline"},
    "deploy": {"front_door", "verifier_svc", "drafter_svc", "planner", "treeline"},
    "bench": {"distill", "deploy", "front_door", "verifier_svc", "drafter_svc", "lm", "planner", "treeline"},
    "cli": {"bench", "distill", "deploy", "front_door", "verifier_svc", "drafter_svc", "lm", "planner", "treeline"},
}
NEVER = {"treeline": {"torch", "ray", "transformers"}, "planner": {"torch", "ray", "transformers"}}


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_lies_below_it(room):
    for path in (ROOT / room).rglob("*.py"):
        names = imported(path)
        wrong = (names & set(MAY_IMPORT)) - MAY_IMPORT[room] - {room}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"
        heavy = names & NEVER.get(room, set())
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


def test_every_package_is_a_room():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == set(MAY_IMPORT)
