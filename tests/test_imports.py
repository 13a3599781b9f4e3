"""The rooms of the house: imports only go downwards, never in a circle, and no folder is crowded."""

from __future__ import annotations

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVICES = {"front_door", "verifier_svc", "drafter_svc", "planner"}
BELOW_BENCH = SERVICES | {"deploy", "distill", "lm", "treeline"}
MAY_IMPORT = {
    "treeline": set(),
    "planner": {"treeline"},
    "planner.fast": {"planner.policies", "treeline"},
    "planner.policies": {"planner.fast", "treeline"},
    "lm": {"treeline"},
    "distill": {"lm", "drafter_svc", "treeline"},
    "drafter_svc": {"lm", "planner.fast", "planner.policies", "treeline"},
    "verifier_svc": {"lm", "planner", "treeline"},
    "front_door": {"treeline"},
    "deploy": SERVICES | {"treeline"},
    "bench": BELOW_BENCH,
    "cli": BELOW_BENCH | {"bench"},
}
"""What each room may import besides itself; a room within a room has a line of its own."""
NEVER = {
    "treeline": {"torch", "ray", "transformers"},
    "planner": {"torch", "ray", "transformers"},
    "planner.fast": {"grpc"},
    "front_door": {"torch", "ray", "transformers"},
}
MOST_FILES = 12


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


ROOMS = {room for room in MAY_IMPORT if "." not in room}
MODULES = {module_name(path): path for room in ROOMS for path in (ROOT / room).rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it and for type checks too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
    return found


def is_in(module: str, rooms: set[str]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_lies_below_it(room):
    allowed = MAY_IMPORT[room] | {room}
    for module, path in MODULES.items():
        if is_in(module, {room}):
            names = imported(path)
            wrong = {name for name in names if is_in(name, ROOMS) and not is_in(name, allowed)}
            assert not wrong, f"{module} imports {wrong}"
            heavy = {name for name in names if is_in(name, NEVER.get(room, set()))}
            assert not heavy, f"{module} imports {heavy}"


def test_no_imports_in_a_circle():
    graph = {module: (imported(path) & MODULES.keys()) - {module} for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_no_folder_is_crowded():
    """Source files of each folder, but for `__init__.py` and generated code."""
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.*")]
    sources = [path for path in files if path.suffix in (".py", ".c")]
    counts = Counter(str(p.parent.relative_to(ROOT)) for p in sources if p.name != "__init__.py")
    del counts["treeline/v1"]
    crowded = {folder: n for folder, n in counts.items() if n > MOST_FILES}
    assert not crowded, f"more than {MOST_FILES} files: {crowded}"


def test_every_package_is_a_room():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == ROOMS
