"""EAGLE-3 and 3.1 draft heads on disk, in every published format; ours are written as "speculators".

Flat (EAGLE's own trainer, SpecForge, NeMo): config.json like that of a one-layer Llama, tensors "midlayer.*".
speculators: config.json with "speculators_model_type", tensors "layers.0.*". Either may prefix names with "model.".
Anything ambiguous is refused: a head that is read wrong drafts badly without an error.

torch is imported only to read tensors: checking a head takes its config.json and the headers of its files.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.checkpoints.headers import tensor_shapes
from treeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
IDS = "eagle_aux_hidden_state_layer_ids"
EAGLE_ROPE_THETA = 10_000.0
"""For a head whose config.json has none, as in EAGLE's code. The target's would be wrong."""
CONVERT = (
    "it holds .bin weights; convert them: python -c \"import torch, safetensors.torch as s; w = torch.load('{0}/"
    "pytorch_model.bin', weights_only=True); s.save_file({{k: v.contiguous() for k, v in w.items()}}, '{0}/{1}')\""
)


@dataclass(frozen=True)
class HeadConfig:
    """The shape of a head, and what it reads of its target.

    Attributes:
        rope: as transformers' `rope_parameters`.
        feature_layers: which hidden states of the target it reads, as `FeatureTap` counts them.
        target_hidden_size, target_vocab_size: of the target.
        norm_before_residual: the residual of the first layer is the normed state, not the state itself.
        norm_before_fc: one norm over all features; `fc_norm`: one for each of them.
        norm_output: the state handed to the next draft token is the normed output.
        qk_norm: queries and keys are normed (Qwen3).
        vocabulary_sha256: of the target's tokenizer; empty if the head does not say.
    """

    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: dict[str, Any]
    feature_layers: tuple[int, ...]
    target_hidden_size: int
    target_vocab_size: int
    draft_vocab_size: int
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    qk_norm: bool = False
    vocabulary_sha256: str = ""

    @property
    def feature_width(self) -> int:
        return self.target_hidden_size * len(self.feature_layers)


def read_config(folder: Path, target_layers: int, feature_layers: tuple[int, ...] = ()) -> HeadConfig:
    """The shape of the head in `folder`.

    Args:
        target_layers: the target's number of layers.
        feature_layers: replace those in config.json, unless empty.

    Raises:
        ConfigError: config.json is not that of an EAGLE-3 head, or lacks required settings.
    """
    try:
        top = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"no draft head in {folder}: {CONFIG_FILE} cannot be read: {error}") from None
    kind = top.get("speculators_model_type")
    if kind not in (None, "eagle3"):
        raise ConfigError(f"the draft head {folder} is of kind '{kind}'; heads of kind eagle3 are supported")
    if kind is not None and "norm_before_residual" not in top:
        # The speculators library defaults to false, vLLM to true.
        raise ConfigError(f"the draft head {folder} does not say norm_before_residual; set it in its {CONFIG_FILE}")
    layer, eagle, ours = (
        top.get("transformer_layer_config", top),
        top.get("eagle_config") or {},
        top.get("treeline") or {},
    )
    if layer.get("num_hidden_layers", 1) != 1:
        raise ConfigError(f"the draft head {folder} has {layer['num_hidden_layers']} layers; one is supported")
    norm_output = bool(top.get("norm_output"))
    if kind is None and norm_output and not top.get("fc_norm"):
        logger.warning("head %s: norm_output is read as SpecForge's norm before lm_head; states stay un-normed", folder)
        norm_output = False
    size, heads = layer["hidden_size"], layer["num_attention_heads"]
    vocab = layer["vocab_size"]
    return HeadConfig(
        hidden_size=size,
        intermediate_size=layer["intermediate_size"],
        heads=heads,
        kv_heads=layer.get("num_key_value_heads") or heads,
        head_dim=layer.get("head_dim") or size // heads,
        norm_eps=layer.get("rms_norm_eps", 1e-6),
        rope=_rope(layer),
        feature_layers=feature_layers or _feature_layers(folder, top.get(IDS) or eagle.get(IDS), kind, target_layers),
        target_hidden_size=top.get("target_hidden_size") or size,
        target_vocab_size=vocab,
        draft_vocab_size=top.get("draft_vocab_size") or top.get("truncated_vocab_size") or vocab,
        norm_before_residual=bool(top.get("norm_before_residual")),
        norm_before_fc=bool(top.get("norm_before_fc")),
        fc_norm=bool(top.get("fc_norm")),
        norm_output=norm_output,
        qk_norm=kind is not None and layer.get("model_type") == "qwen3",
        vocabulary_sha256=ours.get("vocabulary_sha256", ""),
    )


def check_files(folder: Path) -> list[Path]:
    """The files of a head's weights. Only their headers are read.

    Raises:
        ConfigError: there are none, or they are those of another kind of head.
        SafetensorError: one of them is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        more = CONVERT.format(folder, WEIGHTS_FILE) if any(folder.glob("*.bin")) else "it has no safetensors weights"
        raise ConfigError(f"cannot load the draft head {folder}: {more}")
    shapes: dict[str, list[int]] = {}
    for path in files:
        shapes |= {_name(name): shape for name, shape in tensor_shapes(path).items()}
    if "layers.0.hidden_norm.weight" not in shapes:
        outputs, inputs = shapes.get("fc.weight", (0, 0))
        eagle_1 = outputs > 0 and inputs == 2 * outputs
        what = "an EAGLE-1 head" if eagle_1 else "no EAGLE-3 head (it has no layers.0.hidden_norm.weight)"
        raise ConfigError(f"{folder} is {what}; only EAGLE-3 heads are supported")
    return files


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a head by their speculators names. Raises what `check_files` does."""
    from safetensors.torch import load_file

    return {_name(name): tensor for path in check_files(folder) for name, tensor in load_file(path).items()}


def check_tensors(folder: Path, tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise ConfigError unless `tensors` are exactly those `wanted`, by names and shapes."""
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors:
            problem = f"tensor {name} is missing"
        elif name not in wanted:
            problem = f"tensor {name} is of no use to it; some flag in {CONFIG_FILE} may be wrong"
        elif tensors[name].shape != wanted[name].shape:
            problem = f"tensor {name} is {[*tensors[name].shape]}, not {[*wanted[name].shape]}"
        else:
            continue
        raise ConfigError(f"cannot load the draft head {folder}: {problem}")


def pop_draft_ids(folder: Path, tensors: dict[str, Tensor], config: HeadConfig) -> Tensor:
    """int64 [draft_vocab_size]: the target's token id of each draft token; removes `d2t` and `t2d` from `tensors`.

    d2t holds offsets: draft token i is the target's token i + d2t[i], and t2d is true at exactly these.
    Example: d2t [0, 1, 3] means tokens [0, 2, 5].

    Raises:
        ConfigError: d2t or t2d is missing, or they do not match.
    """
    import torch

    ids = torch.arange(config.draft_vocab_size)
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    problem = None
    if (d2t is None) != (t2d is None):
        problem = f"tensor {'d2t' if d2t is None else 't2d'} is missing"
    elif d2t is None or t2d is None:
        if config.draft_vocab_size != config.target_vocab_size:
            problem = "tensors d2t and t2d are missing"
    elif d2t.shape != ids.shape or t2d.shape != (config.target_vocab_size,):
        problem = f"d2t is {[*d2t.shape]} and t2d {[*t2d.shape]}, but {CONFIG_FILE} tells of other vocabularies"
    else:
        ids = ids + d2t.long()
        if not torch.equal(ids.sort().values, t2d.nonzero()[:, 0]):
            problem = "d2t as offsets does not give the tokens of t2d, each once"
    if problem is not None:
        raise ConfigError(f"cannot load the draft head {folder}: {problem}")
    return ids


def write_head(folder: Path, config: HeadConfig, tensors: dict[str, Tensor], draft_ids: Tensor) -> None:
    """Write a head in bfloat16.

    Args:
        tensors: by their speculators names, without `d2t` and `t2d`.
        draft_ids: int64 [draft_vocab_size], increasing.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().to(torch.bfloat16).contiguous().cpu() for name, weight in tensors.items()}
    chosen = torch.zeros(config.target_vocab_size, dtype=torch.bool)
    chosen[draft_ids.cpu()] = True
    weights |= {"d2t": draft_ids.cpu() - torch.arange(len(draft_ids)), "t2d": chosen}
    save_file(weights, folder / WEIGHTS_FILE)
    described = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.5.0",
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        IDS: config.feature_layers,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "tie_word_embeddings": False,
        "transformer_layer_config": {
            "model_type": "qwen3" if config.qk_norm else "llama",
            "num_hidden_layers": 1,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope["rope_theta"],
            "vocab_size": config.target_vocab_size,
        },
        "treeline": {"vocabulary_sha256": config.vocabulary_sha256},
    }
    (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")


def _name(name: str) -> str:
    name = name.removeprefix("model.")
    return f"layers.0.{name.removeprefix('midlayer.')}" if name.startswith("midlayer.") else name


def _rope(layer: dict[str, Any]) -> dict[str, Any]:
    given = dict(layer.get("rope_parameters") or layer.get("rope_scaling") or {})
    kind = given.pop("type", None) or given.pop("rope_type", None) or "default"
    theta = given.pop("rope_theta", None) or layer.get("rope_theta") or EAGLE_ROPE_THETA
    return {**given, "rope_type": kind, "rope_theta": float(theta)}


def _feature_layers(folder: Path, ids: list[int] | None, kind: str | None, layers: int) -> tuple[int, ...]:
    """Ids as boundaries: k means after k layers. Flat heads give the 0-based index of the layer, so id 1 becomes 2.

    A flat head with the id of a layer beyond the last one already counts boundaries.
    """
    if ids is None:
        ids = [2, layers // 2, layers - 3]
    elif kind is None and max(ids) < layers:
        ids = [id + 1 for id in ids]
    logger.info("head %s reads the target's hidden states behind layers %s of %d", folder, ids, layers)
    return tuple(ids)
