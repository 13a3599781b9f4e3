"""What the header of a safetensors file says; no tensor is read."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of all tensors, by name.

    Raises:
        SafetensorError: it is damaged.
    """
    with safe_open(path, "np") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  (no mapping)
