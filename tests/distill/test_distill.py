"""Making a draft head: the target's own text, resumed wherever it was cut, and a head that learns it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.batches import Corpus
from distill.corpus import read_shard
from distill.pipeline import CHECKPOINT, TEXT_FOLDER, Recipe, default_feature_layers, train_head, write_texts
from distill.trainer import TrainingPlan
from distill.writer import Template
from lm.checkpoints.eagle3 import WEIGHTS_FILE
from lm.draft_head import DraftHead
from lm.model import LanguageModel
from tests.lm.helpers import pad_passes
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from tests.lm.tiny_head import target_features
from treeline.config import ModelConfig
from treeline.errors import ConfigError

RECIPE = Recipe(
    feature_layers=(0,),
    texts=110,
    max_tokens=64,
    slots=16,
    draft_vocab_size=64,
    training=TrainingPlan(epochs=4, batch_tokens=512, depth=2, learning_rate=3e-3),
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("target")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return ModelConfig(model=str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def model(target: ModelConfig) -> LanguageModel:
    return LanguageModel.load(target)


def nothing(*args: object) -> None:
    pass


@pytest.fixture(scope="module")
def written(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_texts(model, RECIPE, ["how are you", "sing"], folder, nothing)
    return folder


def texts_of(folder: Path) -> dict[int, list[int]]:
    found = {}
    for path in sorted((folder / TEXT_FOLDER).glob("*.safetensors")):
        shard = read_shard(path)
        start = 0
        for index, length in zip(shard.indices, shard.lengths, strict=True):
            found[index] = shard.token_ids[start : start + length].tolist()
            start += length
    return found


def test_texts_are_turns_of_the_template_with_the_targets_own_features(model: LanguageModel, written: Path) -> None:
    template = Template.of(model)
    texts = texts_of(written)
    assert sorted(texts) == list(range(RECIPE.texts))
    prompt = model.tokenizer("how are you", add_special_tokens=False).input_ids
    assert texts[0][: len(template.prefix + prompt + template.infix)] == [*template.prefix, *prompt, *template.infix]
    check_features(written)


def check_features(folder: Path) -> None:
    """Those of the first texts are the target's own."""
    texts, shard = texts_of(folder), read_shard(sorted((folder / TEXT_FOLDER).glob("*.safetensors"))[0])
    features, start = load_file(shard.path)["features"], 0
    for index, length in list(zip(shard.indices, shard.lengths, strict=True))[:5]:
        wanted = target_features(tiny_llama(), texts[index])
        torch.testing.assert_close(features[start : start + length].float(), wanted, rtol=2e-2, atol=2e-2)
        start += length


def test_writing_goes_on_after_a_kill_and_comes_to_the_same_texts(
    model: LanguageModel, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.corpus.SHARD_TOKENS", 1000)

    def killed(texts: int, tokens: int) -> None:
        if texts == 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_texts(model, RECIPE, ["how are you", "sing"], tmp_path, killed)
    part = texts_of(tmp_path)
    assert 0 < len(part) < 60
    write_texts(model, RECIPE, ["how are you", "sing"], tmp_path, nothing)
    assert texts_of(tmp_path) == texts_of(written)


def test_padded_passes_write_the_same_texts(
    model: LanguageModel, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU runs them: features come out of the pass, not off its modules."""
    monkeypatch.setattr(model.passes, "padded", True)
    pad_passes(model.passes)
    write_texts(model, replace(RECIPE, texts=20), ["how are you", "sing"], tmp_path, nothing)
    texts = texts_of(written)
    assert texts_of(tmp_path) == {index: texts[index] for index in range(20)}
    check_features(tmp_path)


def test_a_folder_of_other_texts_is_refused(model: LanguageModel, written: Path) -> None:
    with pytest.raises(ConfigError, match="written otherwise"):
        write_texts(model, RECIPE, ["another prompt"], written, nothing)
    empty = written.parent / "empty"
    (empty / TEXT_FOLDER).mkdir(parents=True)
    with pytest.raises(ConfigError, match="too few to train on"):
        train_head(ModelConfig(model=str(written)), RECIPE, empty, nothing)


def test_no_text_is_both_trained_on_and_held_out_and_no_turn_comes_twice(written: Path) -> None:
    corpus = Corpus(written / TEXT_FOLDER)
    training, held_out = ({s.index for s in part} for part in (corpus.training, corpus.held_out))
    assert held_out
    assert not training & held_out
    turns = [tuple(s.token_ids[s.turn_start :].tolist()) for s in corpus.training + corpus.held_out]
    assert len(turns) == len(set(turns))
    seen = [s.index for batch in corpus.epoch(0, 1, 512) for s in batch]
    assert sorted(seen) == sorted(training)
    assert corpus.epoch(0, 1, 512) != corpus.epoch(1, 1, 512)


class _Stopped(Exception):
    pass


def head_after(target: ModelConfig, written: Path, folder: Path, stop_at: Iterator[int]) -> dict[str, torch.Tensor]:
    """The weights of a training that is cut at these steps and taken up again."""
    (folder / TEXT_FOLDER).symlink_to(written / TEXT_FOLDER)
    for stop in [*stop_at, None]:
        steps = 0

        def watch(progress: object, stop: int | None = stop) -> None:
            nonlocal steps
            steps += 1
            if steps == stop:
                raise _Stopped

        try:
            train_head(target, RECIPE, folder, watch)
        except _Stopped:
            continue
    return load_file(folder / WEIGHTS_FILE)


def test_a_head_learns_and_one_seed_gives_one_head_however_often_it_was_cut(
    target: ModelConfig, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    (whole / TEXT_FOLDER).symlink_to(written / TEXT_FOLDER)
    train_head(target, RECIPE, whole, lambda progress: losses.append(progress.loss))
    quarter = len(losses) // 4
    assert sum(losses[-quarter:]) < 0.9 * sum(losses[:quarter])
    monkeypatch.setattr("distill.trainer.SAVE_INTERVAL_S", 0.0)
    weights, again = load_file(whole / WEIGHTS_FILE), head_after(target, written, cut, iter([5, 9]))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert (cut / CHECKPOINT).exists()
    head = DraftHead.load(whole, target)
    assert head.config.draft_vocab_size == len(head.draft_ids) == 64
    assert head.draft_ids.tolist() == sorted(head.draft_ids.tolist())


def test_default_feature_layers_lie_within_the_target(model: LanguageModel) -> None:
    assert default_feature_layers(model) == ()
