"""The most memory that a verifier ever holds, measured in a process of its own that loads, answers and ends."""

from __future__ import annotations

import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from treeline.config import Config

ANSWER_TOKENS = 16
ALLOWED_BYTES = 400e6
WEIGHTS_FACTOR = 1.6


@dataclass(frozen=True)
class Memory:
    """Resident megabytes of a verifier's process.

    Attributes:
        peak_mb: the most it ever held, loading included.
        loaded_mb: what it held when it had answered.
        python_mb: before a model was loaded: Python, torch and transformers.
        weights_mb: all weights in the type that the model runs in.
        kv_pool_mb: the KV cache.
        target_mb: 1.6 x weights + KV pool + 400 MB.
    """

    peak_mb: float
    loaded_mb: float
    python_mb: float
    weights_mb: float
    kv_pool_mb: float
    target_mb: float


def measure_memory(config: Config, prompts: list[list[int]]) -> Memory:
    """Load the target in a fresh process, answer these prompts all at once without a drafter, and look.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_load_and_answer, config, prompts).result()


def _load_and_answer(config: Config, prompts: list[list[int]]) -> Memory:
    from lm.model import LanguageModel
    from lm.store import resolve_model
    from planner.fast.fallback import builtin_plan
    from treeline.sampling import SamplingParams
    from verifier_svc.engine.engine import Engine
    from verifier_svc.engine.request import GenerationRequest

    python_mb, _ = _resident_mb()
    model = LanguageModel.load(config.verifier.target)
    plan = builtin_plan(config.limits)
    engine = Engine(model, None, lambda: plan, config)
    for index, token_ids in enumerate(prompts):
        engine.add(GenerationRequest(str(index), token_ids, SamplingParams(), ANSWER_TOKENS, policy="off"))
    while engine.has_work:
        engine.step()
    weights = stored_weights(resolve_model(config.verifier.target.model)) * model.dtype.itemsize
    pool = sum(tensor.nbytes for tensor in (*engine.cache.keys, *engine.cache.values))
    loaded_mb, peak_mb = _resident_mb()
    return Memory(
        peak_mb=peak_mb,
        loaded_mb=loaded_mb,
        python_mb=python_mb,
        weights_mb=weights / 1e6,
        kv_pool_mb=pool / 1e6,
        target_mb=(WEIGHTS_FACTOR * weights + pool + ALLOWED_BYTES) / 1e6,
    )


def stored_weights(folder: Path) -> int:
    """How many numbers a model's safetensors files hold; a weight that layers share is there once."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        total += sum(map(math.prod, shapes))
    return total


def _resident_mb() -> tuple[float, float]:
    """What this process holds now, and the most it ever held (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now_mb, most_mb = (int(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))
    return now_mb, max(now_mb, most_mb)  # the kernel brings them up to date at different times
