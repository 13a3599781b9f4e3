"""A target's shape and weights for its draft head: plainly from its files, or by asking transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm.checkpoints.target import TargetShape, input_embedding, output_rows, target_shape
from tests.lm.tiny import tiny_llama

SHAPE = TargetShape(hidden_size=48, vocab_size=260, num_hidden_layers=2, max_position_embeddings=512)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing anything of transformers fails."""
    monkeypatch.setitem(sys.modules, "transformers", None)


def change(folder: Path, *without: str, **values: object) -> None:
    file = folder / "config.json"
    told = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in told.items() if name not in without}))


def test_files_that_say_it_plainly_are_read_without_transformers(folder: Path, alone: None) -> None:
    weights = load_file(folder / "model.safetensors")
    assert target_shape(folder) == SHAPE
    assert torch.equal(input_embedding(folder, SHAPE), weights["model.embed_tokens.weight"])
    assert torch.equal(output_rows(folder, SHAPE), weights["lm_head.weight"])


def test_a_default_of_the_architecture_is_known(folder: Path) -> None:
    change(folder, "max_position_embeddings")
    assert target_shape(folder).max_position_embeddings == 2048  # LlamaConfig's


def test_output_rows_may_be_the_embeddings(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    change(folder, tie_word_embeddings=True)
    assert torch.equal(output_rows(folder, SHAPE), weights["model.embed_tokens.weight"])


def test_of_two_tables_the_models_own_is_taken(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["audio.embed_tokens.weight"] = torch.zeros(260, 48)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(input_embedding(folder, SHAPE), weights["model.embed_tokens.weight"])
