"""Stores device profiles in the cache folder, by model, device, precision, threads and versions."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import treeline
from lm.cpu.native import fingerprint
from lm.cuda.layout import BUCKETS
from lm.device import processor_name
from lm.kv_cache import KVCache
from lm.model import LanguageModel
from lm.store import cache_folder
from treeline.plan import CostCurve
from verifier_svc.service.profile import profile_verification

logger = logging.getLogger(__name__)


def verification_profile(model: LanguageModel, cache: KVCache, refresh: bool = False) -> tuple[CostCurve, ...]:
    """The stored profile of this model on this device; measured, and stored, if there is none or `refresh` is set.

    If a stored profile cannot be read, or the folder cannot be written, a warning is logged.
    """
    identity = _identity(model, cache)
    path = profile_path(identity)
    curves = None if refresh else _load(path, identity)
    if curves is None:
        slow = model.passes.slow
        curves = profile_verification(model, cache)
        if model.passes.slow > slow:
            logger.warning("the device profile was not stored: some of its passes ran uncaptured or packed")
        else:
            _save(path, identity, curves)
    return curves


def stored_profiles() -> dict[str, str]:
    """The text of every stored profile, by file name: for other nodes."""
    return {path.name: path.read_text() for path in _folder().glob("*.json")}


def keep_profiles(profiles: dict[str, str]) -> None:
    """Store another node's `stored_profiles`, unless they are here already. Each names what was measured."""
    for name, text in profiles.items():
        path = _folder() / Path(name).name
        if not path.exists():
            _write(path, text)


def profile_path(identity: dict[str, Any]) -> Path:
    """The file of the profile that `identity` describes."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return _folder() / f"{identity['model'].replace('/', '--')}-{digest[:12]}.json"


def _identity(model: LanguageModel, cache: KVCache) -> dict[str, Any]:
    """Everything that the curves depend on."""
    on_cuda = model.device.type == "cuda"
    return {
        "model": model.name,
        "architecture": model.architecture,
        "parameters": sum(parameter.numel() for parameter in model.hf.parameters()),
        "device": torch.cuda.get_device_name(model.device) if on_cuda else processor_name(),
        "dtype": str(model.dtype),
        "layers": sorted({type(layer).__name__ for layer in model.hf.modules()}),
        "arithmetic": model.arithmetic,
        "kernels": fingerprint(),
        "threads": torch.get_num_threads(),
        "kv_cache_tokens": cache.total_blocks * cache.block_tokens,
        "kv_block_tokens": cache.block_tokens,
        "buckets": list(BUCKETS) if model.passes.padded else [],
        "triton": _version("triton") if on_cuda else "",
        "driver": torch._C._cuda_getDriverVersion() if on_cuda else 0,  # type: ignore[attr-defined]
        "torch": torch.__version__,
        "treeline": treeline.__version__,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _load(path: Path, identity: dict[str, Any]) -> tuple[CostCurve, ...] | None:
    try:
        stored = json.loads(path.read_text())
        if stored["identity"] != identity:
            raise ValueError("its identity differs")
        curves = [CostCurve(c["sequences"], c["context_tokens"], *_points(c)) for c in stored["curves"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("measuring again: the stored profile %s cannot be used: %s", path, error)
        return None
    return tuple(curves)


def _points(curve: dict[str, Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    tokens, seconds = tuple(map(int, curve["tokens"])), tuple(map(float, curve["seconds"]))
    if not tokens or list(tokens) != sorted(set(tokens)) or len(tokens) != len(seconds) or not min(seconds) > 0:
        raise ValueError("a curve is malformed")
    return tokens, seconds


def _save(path: Path, identity: dict[str, Any], curves: tuple[CostCurve, ...]) -> None:
    _write(path, json.dumps({"identity": identity, "curves": [asdict(curve) for curve in curves]}, indent=1) + "\n")


def _folder() -> Path:
    return cache_folder() / "profiles"


def _write(path: Path, text: str) -> None:
    """Write a temporary file and rename it, so that nobody ever reads half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".profile-", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("the device profile cannot be stored in %s: %s", path.parent, error.strerror)
