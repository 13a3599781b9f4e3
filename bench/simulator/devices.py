"""What steps cost: devices from published peak figures, or curves that were measured."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treeline.errors import ConfigError
from treeline.plan import CostCurve, VerifierProfile

TILE_TOKENS = 64
"""Rows of a matrix-multiplication tile: a pass costs as much as one that fills its last tile."""
MOST_TOKENS = 2560
CONTEXTS = (64, 2048)
LAUNCH_S = 20e-6
"""Host and launch time of one layer of a model, an assumption."""
STEP_OVERHEAD_S = 1e-3
"""Scheduling, sampling and streaming of a step, an assumption."""
ROUND_TRIP_S = 0.3e-3
"""To a drafter in another process and back, an assumption."""


@dataclass(frozen=True)
class Gpu:
    """Published peaks: dense bf16 FLOP/s, bytes/s of memory."""

    flop_s: float
    bytes_s: float


@dataclass(frozen=True)
class Model:
    """A bf16 model. kv_bytes: of one token's keys and values."""

    parameters: float
    layers: int
    kv_bytes: int


@dataclass(frozen=True)
class Device:
    """The costs of simulated steps.

    Attributes:
        profile: verification curves and drafting costs, as a planner would measure them; the simulated passes cost
            exactly this before noise and drift.
        draft_round_trip_s, step_overhead_s: added to these.
    """

    name: str
    profile: VerifierProfile
    draft_round_trip_s: float
    step_overhead_s: float


GPUS = {
    "h100": Gpu(989e12, 3.35e12),
    "l40s": Gpu(362e12, 0.864e12),
    "rtx-pro-6000": Gpu(503e12, 1.792e12),
}
MODELS = {
    "llama-8b": (Model(8.03e9, 32, 131072), Model(0.42e9, 1, 4096)),
    "llama-70b": (Model(70.6e9, 80, 327680), Model(1.5e9, 1, 4096)),
}
"""Target, and a draft head in the manner of EAGLE-3: one layer, a reduced vocabulary."""
PRESETS = [f"{model}@{gpu}" for model in MODELS for gpu in GPUS]


def preset(name: str) -> Device:
    """A model on a GPU, by roofline: a pass takes as long as reading the weights or multiplying, whichever is longer.

    Raises:
        ConfigError: there is no such preset.
    """
    model, _, gpu = name.partition("@")
    if model not in MODELS or gpu not in GPUS:
        raise ConfigError(f"preset '{name}': one of {', '.join(PRESETS)}")
    target, head = MODELS[model]
    curves = tuple(_curve(target, GPUS[gpu], context) for context in CONTEXTS)
    layer_s = head.layers * LAUNCH_S + 2 * head.parameters / GPUS[gpu].bytes_s
    node_s = 2 * head.parameters / GPUS[gpu].flop_s
    return Device(name, VerifierProfile(curves, layer_s, node_s), ROUND_TRIP_S, STEP_OVERHEAD_S)


def measured(path: Path, draft_layer_s: float, draft_node_s: float) -> Device:
    """The curves that `treeline profile --json` prints.

    Raises:
        ConfigError: the file is something else.
    """
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())
        curves = tuple(
            CostCurve(row["sequences"], row["context_tokens"], tuple(row["tokens"]), tuple(row["seconds"]))
            for row in rows
        )
        if not curves or any(len(c.tokens) != len(c.seconds) or len(c.tokens) < 2 for c in curves):
            raise ValueError("a curve needs tokens and as many seconds")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not what `treeline profile --json` prints ({error})") from None
    return Device(path.name, VerifierProfile(curves, draft_layer_s, draft_node_s), ROUND_TRIP_S, STEP_OVERHEAD_S)


def _curve(model: Model, gpu: Gpu, context_tokens: int) -> CostCurve:
    """Both ends of every tile, up to MOST_TOKENS."""
    tiles = range(math.ceil(MOST_TOKENS / TILE_TOKENS))
    tokens = sorted({1, *(TILE_TOKENS * tile + end for tile in tiles for end in (1, TILE_TOKENS))})
    read_s = 2 * model.parameters / gpu.bytes_s
    seconds = []
    for count in tokens:
        multiply_s = 2 * model.parameters * math.ceil(count / TILE_TOKENS) * TILE_TOKENS / gpu.flop_s
        seconds.append(
            max(read_s, multiply_s) + model.kv_bytes * context_tokens / gpu.bytes_s + LAUNCH_S * model.layers
        )
    return CostCurve(1, context_tokens, tuple(tokens), tuple(seconds))
