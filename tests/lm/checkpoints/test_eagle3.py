"""Draft heads in every packaging against a reference in numpy, and everything that would be read wrong is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from lm.checkpoints.eagle3 import IDS, check_tensors, read_config
from lm.draft_head import DraftHead
from lm.packed import PackedSequence
from tests.lm.tiny import tiny_model, tiny_tokenizer
from treeline.config import ModelConfig
from treeline.errors import ConfigError

H, INNER, HEADS, KV, DIM, VT, VD, LAYERS, EPS = 32, 64, 4, 2, 8, 97, 41, 8, 1e-5
TOKENS = [5, 17, 88, 3, 40]
Weights = dict[str, torch.Tensor]


def draft_ids() -> torch.Tensor:
    return torch.arange(VD) * 2 + 3


def weights(**flags: bool) -> Weights:
    """By their speculators names."""
    shapes = {
        "fc": (H, 3 * H),
        **{f"layers.0.{name}": (H,) for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")},
        "layers.0.self_attn.q_proj": (HEADS * DIM, 2 * H),
        **{f"layers.0.self_attn.{name}": (KV * DIM, 2 * H) for name in ("k_proj", "v_proj")},
        "layers.0.self_attn.o_proj": (H, HEADS * DIM),
        **{f"layers.0.mlp.{name}": (INNER, H) for name in ("gate_proj", "up_proj")},
        "layers.0.mlp.down_proj": (H, INNER),
        "norm": (H,),
        "lm_head": (VD, H),
    }
    if flags.get("norm_before_fc"):
        shapes["input_norm"] = (3 * H,)
    if flags.get("fc_norm"):
        shapes |= {f"fc_norm.{i}": (H,) for i in range(3)}
    rng = torch.Generator().manual_seed(1)
    made = {f"{name}.weight": torch.randn(shape, generator=rng) * 0.2 for name, shape in shapes.items()}
    made |= {name: 1 + weight for name, weight in made.items() if weight.ndim == 1}
    t2d = torch.zeros(VT, dtype=torch.bool)
    t2d[draft_ids()] = True
    return made | {"d2t": draft_ids() - torch.arange(VD), "t2d": t2d}


SHAPE = {
    "num_hidden_layers": 1,
    "hidden_size": H,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": DIM,
    "rms_norm_eps": EPS,
    "vocab_size": VT,
}


def speculators(**flags: Any) -> dict[str, Any]:
    layer = {**SHAPE, "model_type": "llama", **flags.pop("layer", {})}
    top = {"speculators_model_type": "eagle3", "speculators_version": "0.5.0", "architectures": ["Eagle3DraftModel"]}
    return {**top, "draft_vocab_size": VD, "norm_before_residual": False, "transformer_layer_config": layer, **flags}


def flat(**more: Any) -> dict[str, Any]:
    return {**SHAPE, "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "draft_vocab_size": VD, **more}


def flat_names(tensors: Weights, prefix: str = "") -> Weights:
    return {prefix + name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}


def write(folder: Path, config: dict[str, Any], tensors: Weights) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("target")
    shape = {**SHAPE, "num_hidden_layers": LAYERS, "max_position_embeddings": 512}
    hf = tiny_model(LlamaConfig(**shape, bos_token_id=None, eos_token_id=1, rope_theta=500_000.0))
    hf.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return ModelConfig(model=str(folder), dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Served heads are rounded to int8."""
    monkeypatch.setattr("lm.draft_head.pack_linear_layers", lambda *args: None)


def features() -> torch.Tensor:
    return torch.randn(len(TOKENS), 3 * H, generator=torch.Generator().manual_seed(2))


def run(folder: Path, target: ModelConfig, depth: int = 2) -> NDArray[np.float32]:
    """Logits [1 + depth, VD] of the last token, and of a chain below it of what the head has first each time."""
    head = DraftHead.load(folder, target)
    cache = head.new_cache(64, 16)
    sequence = cache.allocate(32)
    assert sequence is not None
    logits, states = head.forward([PackedSequence(sequence, TOKENS)], head.states(features()), cache)
    cache.commit([(sequence, list(range(len(TOKENS))))])
    rows = [logits[-1]]
    for step in range(depth):
        token = int(head.draft_ids[rows[-1].argmax()])
        parents = np.arange(-1, step, dtype=np.int32)
        logits, states = head.forward([PackedSequence(sequence, [token], parents)], states[-1:], cache)
        rows.append(logits[-1])
    return torch.stack(rows).numpy()


def reference(w: Weights, target: ModelConfig, depth: int = 2, **flags: bool) -> NDArray[np.float32]:
    """The same, by the formulas: attention over all tokens anew at each step."""
    m = {name: tensor.double().numpy() for name, tensor in w.items()}
    files = load_file(Path(target.model) / "model.safetensors")
    embedding = files["model.embed_tokens.weight"].double().numpy()

    def norm(x: Any, name: str) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * m[f"{name}.weight"]

    def rope(x: Any) -> Any:  # [tokens, heads, DIM]
        angles = np.arange(len(x))[:, None, None] * 10_000.0 ** (-np.arange(0, DIM, 2) / DIM)
        a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
        return np.concatenate((a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)), -1)

    def layer(tokens: list[int], g: Any) -> Any:
        p = "layers.0."
        h = norm(g, p + "hidden_norm")
        x = np.concatenate((norm(embedding[tokens], p + "input_layernorm"), h), -1)
        q, k, v = ((x @ m[f"{p}self_attn.{n}_proj.weight"].T).reshape(len(x), -1, DIM) for n in "qkv")
        q, k, v = rope(q), np.repeat(rope(k), HEADS // KV, 1), np.repeat(v, HEADS // KV, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(DIM) + np.triu(np.full((len(x), len(x)), -np.inf), 1)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", shares / shares.sum(-1, keepdims=True), v).reshape(len(x), -1)
        y = (h if flags.get("norm_before_residual") else g) + mixed @ m[p + "self_attn.o_proj.weight"].T
        z = norm(y, p + "post_attention_layernorm")
        gate = z @ m[p + "mlp.gate_proj.weight"].T
        return y + (gate / (1 + np.exp(-gate)) * (z @ m[p + "mlp.up_proj.weight"].T)) @ m[p + "mlp.down_proj.weight"].T

    x = features().double().numpy()
    x = norm(x, "input_norm") if flags.get("norm_before_fc") else x
    if flags.get("fc_norm"):
        x = np.concatenate([norm(part, f"fc_norm.{i}") for i, part in enumerate(np.split(x, 3, -1))], -1)
    states, tokens, rows = x @ m["fc.weight"].T, list(TOKENS), []
    for _ in range(depth + 1):
        y = layer(tokens, states)[-1]
        final = norm(y, "norm")
        rows.append(final @ m["lm_head.weight"].T)
        tokens.append(int(draft_ids()[rows[-1].argmax()]))
        states = np.vstack((states, final if flags.get("norm_output") else y))
    return np.array(rows)


PACKAGINGS = {
    "flat": lambda w: (flat(), flat_names(w)),
    "nemo": lambda w: (flat(), {f"model.{name}": tensor for name, tensor in w.items()}),
    "truncated_vocab_size": lambda w: (
        {name: value for name, value in flat(truncated_vocab_size=VD).items() if name != "draft_vocab_size"},
        flat_names(w),
    ),
    "speculators": lambda w: (speculators(), w),
}


@pytest.mark.parametrize("packaging", PACKAGINGS)
def test_every_packaging_gives_the_logits_of_the_reference(packaging: str, target: ModelConfig, tmp_path: Path) -> None:
    folder = write(tmp_path / "head", *PACKAGINGS[packaging](weights()))
    np.testing.assert_allclose(run(folder, target), reference(weights(), target), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flag", ["norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"])
def test_each_flag_changes_the_logits_as_the_reference_says(flag: str, target: ModelConfig, tmp_path: Path) -> None:
    w = weights(**{flag: True})
    folder = write(tmp_path / "head", speculators(**{flag: True}), w)
    expected = reference(w, target, **{flag: True})
    np.testing.assert_allclose(run(folder, target), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - reference(weights(), target)).max() > 1e-2


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (flat(**{IDS: [1, 3, 4]}), (2, 4, 5)),
        (flat(eagle_config={IDS: [1, 3, 4]}), (2, 4, 5)),
        (speculators(**{IDS: [2, 4, 5]}), (2, 4, 5)),
        (flat(), (2, 4, 5)),
        (speculators(), (2, 4, 5)),
        (flat(**{IDS: [4, 6, 8]}), (4, 6, 8)),
        (speculators(**{IDS: [4, 6, 8]}), (4, 6, 8)),
    ],
)
def test_layers_are_counted_one_way(config: dict[str, Any], layers: tuple[int, ...], tmp_path: Path) -> None:
    assert read_config(write(tmp_path / "head", config, weights()), LAYERS).feature_layers == layers


def test_the_operator_may_say_which_layers_and_is_told_which(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "head", flat(**{IDS: [1, 4, 5]}), weights())
    assert read_config(folder, LAYERS, (1, 4, 5)).feature_layers == (1, 4, 5)
    with caplog.at_level(logging.INFO):
        read_config(folder, LAYERS)
    assert "behind layers [2, 5, 6] of 8" in caplog.text


def test_norm_output_of_a_flat_head_is_specforges(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not read_config(write(tmp_path / "head", flat(norm_output=True), weights()), LAYERS).norm_output
    assert "norm_output" in caplog.text
    assert read_config(write(tmp_path / "head", flat(norm_output=True, fc_norm=True), weights()), LAYERS).norm_output


def test_rope_and_head_dim_are_the_heads_own(tmp_path: Path) -> None:
    config = read_config(write(tmp_path / "head", flat(rope_scaling=None, head_dim=16), weights()), LAYERS)
    assert config.rope == {"rope_type": "default", "rope_theta": 10_000.0}
    assert config.head_dim == 16
    scaled = flat(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    rope = read_config(write(tmp_path / "head", scaled, weights()), LAYERS).rope
    assert rope == {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}


@pytest.mark.parametrize("fault", ["missing", "renamed", "cut"])
def test_a_tensor_that_does_not_fit_is_named(fault: str, tmp_path: Path) -> None:
    wanted = weights()
    for name, tensor in wanted.items():
        w = {other: each for other, each in wanted.items() if other != name}
        if fault == "renamed":
            w["a.weight"] = tensor
        if fault == "cut":
            w[name] = tensor[:-1]
        with pytest.raises(ConfigError, match="a.weight is of no use" if fault == "renamed" else name) as caught:
            check_tensors(tmp_path, w, wanted)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "change", "reason"),
    [
        (speculators(), {"lm_head.weight": None}, "lm_head.weight is missing"),
        (
            speculators(),
            {"layers.1.mlp.up_proj.weight": torch.zeros(INNER, H)},
            "layers.1.mlp.up_proj.weight is of no use",
        ),
        (speculators(), {"fc.weight": torch.zeros(H, 2 * H + 1)}, "fc.weight is .32, 65., not .32, 96."),
        (speculators(), {"t2d": None}, "t2d is missing"),
        (speculators(), {"d2t": None}, "d2t is missing"),
        (speculators(), {"d2t": None, "t2d": None}, "d2t and t2d are missing"),
        (speculators(), {"d2t": draft_ids()}, "as offsets"),
        (speculators(), {"d2t": torch.zeros(VD, dtype=torch.int64)}, "as offsets"),
        (speculators(draft_vocab_size=VD + 1), {}, "other vocabularies"),
        (flat(), {"layers.0.hidden_norm.weight": None}, "no EAGLE-3 head"),
        (flat(), {"layers.0.hidden_norm.weight": None, "fc.weight": torch.zeros(H, 2 * H)}, "an EAGLE-1 head"),
        (speculators(speculators_model_type="dflash"), {}, "of kind 'dflash'"),
        (flat(num_hidden_layers=4), {}, "has 4 layers"),
        (speculators(target_hidden_size=64), {}, "for a target of hidden size 64"),
        (speculators(fc_norm=True), {}, "fc_norm.0.weight is missing"),
        (speculators(layer={"model_type": "qwen3"}), {}, "k_norm.weight is missing"),
    ],
)
def test_what_would_be_read_wrong_is_refused(
    config: dict[str, Any], change: dict[str, Any], reason: str, target: ModelConfig, tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in {**weights(), **change}.items() if tensor is not None}
    with pytest.raises(ConfigError, match=reason):
        DraftHead.load(write(tmp_path / "head", config, tensors), target)


def test_a_missing_norm_before_residual_is_refused(tmp_path: Path) -> None:
    config = speculators()
    del config["norm_before_residual"]
    with pytest.raises(ConfigError, match="norm_before_residual"):
        read_config(write(tmp_path / "head", config, weights()), LAYERS)


def test_bin_weights_are_refused_with_the_command_that_converts_them(target: ModelConfig, tmp_path: Path) -> None:
    folder = write(tmp_path / "head", flat(), weights())
    (folder / "model.safetensors").unlink()
    torch.save(flat_names(weights()), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"convert them: python -c ") as caught:
        DraftHead.load(folder, target)
    exec(str(caught.value).partition('python -c "')[2].removesuffix('"'))
    np.testing.assert_allclose(run(folder, target), reference(weights(), target), rtol=1e-5, atol=1e-5)


def test_the_targets_quantisation_is_not_the_heads(
    target: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREELINE_CACHE", str(tmp_path / "cache"))
    quantised = tmp_path / "target"
    quantised.mkdir()
    for file in Path(target.model).iterdir():
        (quantised / file.name).write_bytes(file.read_bytes())
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (quantised / "config.json").write_text(json.dumps(config))
    folder = write(tmp_path / "head", speculators(), weights())
    same = run(folder, target.model_copy(update={"model": str(quantised)}))
    np.testing.assert_allclose(same, run(folder, target), rtol=0.05, atol=0.05)  # The embedding is bfloat16 now.


def test_a_head_may_bring_its_embedding_or_share_all_output_rows(target: ModelConfig, tmp_path: Path) -> None:
    files = load_file(Path(target.model) / "model.safetensors")
    w = weights() | {"embed_tokens.weight": files["model.embed_tokens.weight"]}
    own = run(write(tmp_path / "own", speculators(), w), target)
    shared = run(write(tmp_path / "head", speculators(), weights()), target)
    np.testing.assert_allclose(own, shared, rtol=1e-5, atol=1e-5)  # torch's bits depend on where weights lie
    w = {name: tensor for name, tensor in weights().items() if name not in ("lm_head.weight", "d2t", "t2d")}
    head = DraftHead.load(write(tmp_path / "shared", flat(draft_vocab_size=None), flat_names(w)), target)
    assert len(head.draft_ids) == VT


def test_a_head_drafts_as_far_as_its_target_decodes(target: ModelConfig, tmp_path: Path) -> None:
    folder = write(tmp_path / "head", flat(max_position_embeddings=16), flat_names(weights()))
    rotary: Any = DraftHead.load(folder, target)._module.rotary_emb
    assert rotary.max_positions == 512


def test_queries_and_keys_are_normed_where_the_layer_is_qwen3s(target: ModelConfig, tmp_path: Path) -> None:
    w = weights() | {f"layers.0.self_attn.{name}_norm.weight": torch.full((DIM,), 2.0) for name in "qk"}
    folder = write(tmp_path / "head", speculators(layer={"model_type": "qwen3"}), w)
    assert np.abs(run(folder, target) - reference(weights(), target)).max() > 1e-2
