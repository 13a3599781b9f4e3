"""What a draft head takes from its target's files. transformers, which takes seconds to load, is used only where the
files are not explicit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from lm.checkpoints.headers import tensor_shapes
from treeline.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TargetShape:
    """Named as in config.json."""

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    max_position_embeddings: int


def target_shape(folder: Path) -> TargetShape:
    """The shape of the model in `folder`. transformers fills in what config.json omits or names differently.

    Raises:
        OSError, ValueError: config.json cannot be read.
    """
    names = [field.name for field in fields(TargetShape)]
    told = json.loads((folder / "config.json").read_text())
    told = told.get("text_config", told)
    if not all(isinstance(told.get(name), int) for name in names):
        from transformers import AutoConfig

        told = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config().to_dict()
    return TargetShape(**{name: told[name] for name in names})


def input_embedding(folder: Path, shape: TargetShape) -> Tensor:
    """[vocab_size, hidden_size]. Raises ConfigError if the files do not hold it."""
    return _plainly(folder, "embed_tokens.weight", shape, lambda hf: hf.get_input_embeddings())


def output_rows(folder: Path, shape: TargetShape) -> Tensor:
    """Of the output head, [vocab_size, hidden_size]. Raises ConfigError if the files do not hold it."""
    return _plainly(folder, "lm_head.weight", shape, lambda hf: hf.get_output_embeddings())


def _plainly(folder: Path, name: str, shape: TargetShape, layer_of: Callable[[PreTrainedModel], Any]) -> Tensor:
    """The only tensor whose name ends in `name` and whose shape fits, else the weight of `layer_of`. No other tensor
    is read."""
    files = sorted(folder.glob("*.safetensors"))
    shapes = {(path, key): told for path in files for key, told in tensor_shapes(path).items()}
    wanted = [shape.vocab_size, shape.hidden_size]
    found = [place for place, told in shapes.items() if told == wanted and _ends(place[1], name)]
    if len(found) != 1:
        names = _names(folder, layer_of)
        found = [place for place in shapes if any(_ends(place[1], each) for each in names)]
        if not found:
            raise ConfigError(f"the weights of {folder} have no tensor {min(names)}")
    path, key = found[0]
    with safe_open(path, "pt") as file:
        return file.get_tensor(key)


def _ends(key: str, name: str) -> bool:
    """Whether a tensor's dotted name ends in these parts."""
    return f".{key}".endswith(f".{name}")


def _names(folder: Path, layer_of: Callable[[PreTrainedModel], Any]) -> set[str]:
    """All names of a layer's weight, which another layer may share."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    weight = layer_of(hf).weight
    return {name for name, other in hf.named_parameters(remove_duplicate=False) if other is weight}
