"""A decoder-only transformers language model, run over our KV cache with our attention."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lm.attention import (
    CONTEXT,
    IMPLEMENTATION,
    AttentionContext,
    Probe,
    UnsupportedAttentionError,
    attending,
    interface_attention,
)
from lm.cpu.packed_linear import arithmetic_of, gather_weights, pack_linear_layers, read_bytes
from lm.cuda.graphs import Outputs
from lm.device import torch_device, torch_dtype
from lm.features import FeatureTap
from lm.kv_cache import KVCache, LayerShape
from lm.layers.fuse import fuse_layers
from lm.layers.fused import LENGTH_DEPENDENT_ROPE
from lm.layers.older import BIASED, ignored_option, lead_to_interface
from lm.layers.sharded import Shard, keep_shard
from lm.packed import PackedSequence
from lm.passes import Passes
from lm.store import load_tokenizer, model_name, no_progress_bars, one_line, resolve_model
from treeline.config import ModelConfig
from treeline.errors import ConfigError
from treeline.sampling import SamplingParams

logger = logging.getLogger(__name__)

# Deliberately no mask function is registered: transformers builds no mask for an unknown implementation.
AttentionInterface.register(IMPLEMENTATION, interface_attention)


class LanguageModel:
    """Weights, tokenizer and the packed forward pass. Stateless between calls: all state is in the KV cache.

    Attributes:
        name: the name it is served under.
        hf: the transformers model.
        vocab_size: width of the logits; at least the tokenizer's size.
        max_context_tokens: longest sequence it can attend over.
        eos_token_ids: tokens that end a text.
        sampling: from its generation_config.json; greedy if that sets nothing.
        architecture: its class in transformers.
        passes: runs its passes.
        arithmetic: how weights in groups are multiplied, for display; empty if there are none.
    """

    def __init__(
        self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str, required: bool = False
    ) -> None:
        """`required`: as `Passes`."""
        self.name = name
        self.hf = hf.eval()
        self.tokenizer = tokenizer
        self.architecture = type(hf).__name__
        self.device = hf.device
        self.dtype = hf.dtype
        self.layers, self.vocab_size, windows = _probe(hf)
        self.max_context_tokens = _max_context_tokens(hf.config.get_text_config())
        self.eos_token_ids = _eos_token_ids(hf, tokenizer)
        self.sampling = _sampling(hf)
        self.passes = Passes(windows, self.device, required=required)
        self.arithmetic = arithmetic_of(hf)
        self._tap: FeatureTap | None = None

    @classmethod
    def load(cls, config: ModelConfig, shard: Shard | None = None) -> LanguageModel:
        """Find, fetch if needed, and load a model, or only the given shard of it.

        Raises:
            ConfigError: it cannot be found, read or run; one line with the reason.
        """
        device = torch_device(config.device, shard.rank if shard else None)
        folder = resolve_model(config.model)
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.set_float32_matmul_precision("highest")
        tokenizer = load_tokenizer(folder)
        try:
            lead_to_interface(json.loads((folder / "config.json").read_text()).get("model_type"))
            with no_progress_bars():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=torch_dtype(config, folder),
                    attn_implementation=IMPLEMENTATION,
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=True,
                    output_loading_info=True,
                )
            hf, report = loaded
            if shard is not None:
                keep_shard(hf, shard)
            hf.to(device)
            _check_weights(hf, report["missing_keys"])
            pack = functools.partial(pack_linear_layers, quantization=config.quantization, arithmetic=config.arithmetic)
            if config.quantization == "fp8":
                from lm.cuda.fp8 import round_linear_layers  # Triton is not installed everywhere.

                fuse_layers(hf, finish=round_linear_layers)
                round_linear_layers(hf.base_model)  # The output head stays as it is.
            else:
                fuse_layers(hf, finish=pack)
                pack(hf)
                gather_weights(hf)
            _let_go_of_files(hf)
            model = cls(hf, tokenizer, config.name or model_name(config.model), config.cuda_graphs == "require")
        except ConfigError:
            raise
        except Exception as error:  # Reading damaged weights, or a pass over them, can raise anything.
            raise ConfigError(f"cannot load model '{config.model}': {one_line(error)}") from error
        if config.arithmetic == "int8" and "int8" not in model.arithmetic:
            raise ConfigError(f"arithmetic 'int8' needs weights in groups: set quantization for '{config.model}'")
        logger.info("%s computes in %s", model.name, model.arithmetic or str(model.dtype).removeprefix("torch."))
        return model

    @classmethod
    def from_hf(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
        """Wrap a model that is already in memory; switches its attention to ours."""
        lead_to_interface(model.config.model_type)
        model.set_attn_implementation(IMPLEMENTATION)
        return cls(model, tokenizer, model.config.model_type)

    @property
    def weight_bytes(self) -> int:
        """Stored bytes of all weights that every pass reads in full, so without embedding tables."""
        return read_bytes(self.hf)

    def new_cache(self, num_tokens: int | Literal["auto"], block_tokens: int | Literal["auto"]) -> KVCache:
        """An empty KV cache for this model; see `KVCache.sized` for "auto" and errors."""
        cache = KVCache.sized(self.layers, num_tokens, block_tokens, self.dtype, self.device)
        cache.announce = self.passes.announce
        return cache

    @torch.inference_mode()
    def forward(self, sequences: list[PackedSequence], cache: KVCache) -> torch.Tensor:
        """One pass over all sequences' new tokens, whose KV is appended to each one's scratch.

        Returns:
            Logits float32 [rows, vocab_size]: in order of the sequences, then of each one's wanted tokens.

        Raises:
            ValueError: a sequence has no new token, no room for them, or parents that are not a tree.
        """
        if not sequences:
            return torch.empty(0, self.vocab_size, device=self.device)
        logits, *features = self.passes.run(self._run, sequences, cache)
        if self._tap is not None:
            self._tap.put(features)
        return logits.float()

    def capture(self, cache: KVCache) -> None:
        """On CUDA capture the passes over this idle cache, in bounded time and memory, and log how long it took."""
        self.passes.capture(self._run, cache)

    def tap(self, layers: tuple[int, ...]) -> FeatureTap:
        """Record these layers' features in every pass, until the tap is closed or one of other layers replaces it.

        Raises:
            ConfigError: as `FeatureTap`.
        """
        if self._tap is not None and self._tap.is_open and self._tap.layers == layers:
            return self._tap.shared()
        tap = FeatureTap(self.hf, layers)
        if self._tap is not None:
            self._tap.remove()
        self._tap = tap
        self.passes.forget_captured()
        return tap

    def _run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        states: Tensor | None,
        rows: Tensor | None,
        context: AttentionContext,
    ) -> Outputs:
        """The `Body` of its passes: logits, then the tap's features."""
        if self._tap is not None:
            self._tap.put([])
        with attending(context, positions):
            output = self.hf(
                input_ids=token_ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=0 if rows is None else rows,
                **{CONTEXT: context},
            )
        return output.logits[0], *(() if self._tap is None else self._tap.parts())


@torch.inference_mode()
def _probe(hf: PreTrainedModel) -> tuple[list[LayerShape], int, set[int | None]]:
    """Each layer's KV shape, the width of the logits, and the attention windows, found by a pass over two tokens.

    Raises:
        ConfigError: this architecture's state is more than plain keys and values, or it is not decoder-only.
    """

    def refuse(why: object) -> ConfigError:
        return ConfigError(f"{type(hf).__name__} is not supported: {why}")

    config = hf.config.get_text_config()
    if hf.config.is_encoder_decoder:
        raise refuse("it is not decoder-only")
    if hf._is_stateful:
        raise refuse("it keeps recurrent state, which a tree cannot share")
    if option := ignored_option(config):
        raise refuse(f"transformers ignores its {option}")
    if hf.config._attn_implementation != IMPLEMENTATION:
        raise refuse("it does not use the attention interface of transformers")
    if "position_ids" not in inspect.signature(hf.forward).parameters and config.model_type not in BIASED:
        raise refuse("it does not let positions be given")
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        raise refuse(f"it has layers of type {', '.join(sorted(other))}")
    probe = Probe()
    tokens, last = torch.tensor([[0, 1]], device=hf.device), torch.tensor([1], device=hf.device)
    try:
        with attending(probe, tokens[0]):
            logits = hf(
                input_ids=tokens, position_ids=tokens, use_cache=False, logits_to_keep=last, **{CONTEXT: probe}
            ).logits
    except (UnsupportedAttentionError, AttributeError, TypeError, ValueError) as error:
        raise refuse(one_line(error)) from error
    if sorted(probe.shapes) != list(range(config.num_hidden_layers)):
        raise refuse(f"{len(probe.shapes)} of its {config.num_hidden_layers} layers keep keys and values")
    if logits.shape[:2] != (1, 1):
        raise refuse("it cannot compute the logits of chosen tokens only")
    if any(
        kind == "sliding_attention" and probe.windows[layer] is None
        for layer, kind in enumerate(getattr(config, "layer_types", None) or ())
    ):
        raise refuse("its sliding layers do not pass their window")
    shapes = [probe.shapes[layer] for layer in range(config.num_hidden_layers)]
    return shapes, logits.shape[2], set(probe.windows.values())


def _let_go_of_files(hf: PreTrainedModel) -> None:
    """Copy what was not packed: one weight left in a mapped file keeps the whole file in memory."""
    if hf.device.type == "cpu":
        for weight in hf.parameters():
            weight.data = weight.data.clone()


def _check_weights(hf: PreTrainedModel, missing: set[str]) -> None:
    """transformers would fill missing weights at random.

    Raises:
        ValueError: weights are missing or not finite.
    """
    # torch cannot check 8-bit numbers. A NaN becomes both minimum and maximum, so one `aminmax` is enough.
    told = [name for name, w in hf.named_parameters() if w.is_floating_point() and w.itemsize > 1 and w.numel()]
    broken = [name for name in told if not torch.stack(hf.get_parameter(name).aminmax()).isfinite().all()]
    for names, fault in ((sorted(missing), "missing from the files"), (broken, "not finite")):
        if names:
            raise ValueError(f"{len(names)} weights are {fault}, the first is {names[0]}")


def _max_context_tokens(config: PretrainedConfig) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    # These change every frequency once any sequence of the batch is longer than this, so we stay below it.
    if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        original = rope.get("original_max_position_embeddings")
        return original or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
    # MPT uses other names. BLOOM's configurations may omit it: it was trained on 2,048 tokens (arXiv 2211.05100).
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    return next((limit for name in names if (limit := getattr(config, name, None))), 2048)


def _sampling(hf: PreTrainedModel) -> SamplingParams:
    config = getattr(hf, "generation_config", None)
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "min_p")
    given = {name: value for name in names if (value := getattr(config, name, None)) is not None}
    if not getattr(config, "do_sample", False):
        given["temperature"] = 0.0
    return SamplingParams(**{"temperature": 1.0, **given})


def _eos_token_ids(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    found: set[int] = set()
    generation = getattr(hf, "generation_config", None)
    for owner in (generation, hf.config, hf.config.get_text_config(), tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return frozenset(found)
