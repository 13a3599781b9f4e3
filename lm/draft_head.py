"""A draft head (EAGLE-3): a decoder layer that reads a target's hidden states and guesses the token after the next.

At every token it reads the token's embedding and the target's features of the token *before* (EAGLE, arXiv 2401.15077;
features of several layers: EAGLE-3, arXiv 2503.01840). Below the root those features do not exist yet: a draft token
uses the head's own state at its parent instead.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lm.attention import AttentionContext
from lm.checkpoints.eagle3 import HeadConfig, check_tensors, pop_draft_ids, read_config, read_tensors, write_head
from lm.checkpoints.target import input_embedding, output_rows, target_shape
from lm.cpu.native_attention import NativeAttention
from lm.cpu.native_head import native_head
from lm.cpu.packed_linear import gather_weights, pack_linear_layers
from lm.cuda.graphs import Outputs
from lm.cuda.layout import BUCKETS
from lm.device import torch_device, torch_dtype
from lm.kv_cache import KVCache, LayerShape
from lm.layers.fused import ComplexRotary, FusedLayer
from lm.layers.head_layer import HeadLayer, RMSNorm, normed, rotary_of
from lm.packed import PackedSequence
from lm.passes import Passes
from lm.sampling import Row, top_drafts
from lm.store import load_tokenizer, no_progress_bars, one_line, resolve_model, vocabulary_sha256
from treeline.config import ModelConfig
from treeline.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDING, OUTPUT = "embed_tokens.weight", "lm_head.weight"


class HeadModule(nn.Module):
    """The trained layers; tensor names follow the speculators format. Embedding and output rows are kept separately."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        size, width, count = config.hidden_size, config.target_hidden_size, len(config.feature_layers)
        eps = config.norm_eps
        self.input_norm = RMSNorm(count * width, eps) if config.norm_before_fc else None
        self.fc_norm = nn.ModuleList(RMSNorm(width, eps) for _ in range(count)) if config.fc_norm else None
        self.fc = nn.Linear(count * width, size, bias=False)
        self.layers = nn.ModuleList([HeadLayer(config)])
        self.norm = RMSNorm(size, eps)
        self.rotary_emb = rotary_of(config)

    def states(self, features: Tensor) -> Tensor:
        """States [n, hidden] made from the target's features [n, width], in place of the head's own states."""
        if self.input_norm is not None:
            features = normed(features, self.input_norm)
        if self.fc_norm is not None:
            parts = features.split(self.config.target_hidden_size, dim=-1)
            features = torch.cat([normed(part, norm) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features)

    def forward(self, embedded: Tensor, states: Tensor, positions: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """One draft step of tokens with these embeddings and states [1, n, hidden].

        Returns:
            The states for their children, and the inputs of the output rows; both [1, n, hidden].
        """
        config = self.config
        layer: Any = self.layers[0]
        normed_states = normed(states, layer.hidden_norm)
        residual = normed_states if config.norm_before_residual else states
        inputs = torch.cat((normed(embedded, layer.input_norm), normed_states), dim=-1)
        out = layer.mix(inputs, residual, self.rotary_emb(states, positions), context)
        final = normed(out, self.norm)
        return final if config.norm_output else out, final

    def fuse(self, max_positions: int) -> None:
        """Switch to the fused layer, for inference at positions below `max_positions`."""
        layer: Any = self.layers[0]
        self.layers[0] = FusedLayer(layer, None)
        self.layers[0].hidden_norm = layer.hidden_norm
        self.rotary_emb = ComplexRotary(self.rotary_emb, max_positions)


class DraftHead:
    """A trained head, ready to draft for its target. Stateless between calls: all state is in the KV cache.

    Attributes:
        name: its folder's name.
        draft_ids: int64 [draft_vocab_size]; the target's token id of each logits column.
        passes: runs its passes.
    """

    def __init__(
        self,
        name: str,
        module: HeadModule,
        embedding: nn.Embedding,
        output: nn.Module,
        draft_ids: Tensor,
        required: bool = False,
    ) -> None:
        """`output`: the output rows of `draft_ids`; `required`: as `Passes`."""
        self.name, self.config = name, module.config
        self.device, self.dtype = embedding.weight.device, embedding.weight.dtype
        self.draft_ids = draft_ids.to(self.device)
        self._module, self._embedding, self._output = module.eval(), embedding, output
        config = module.config
        self.layers = [LayerShape(config.kv_heads, config.head_dim, config.head_dim)]
        states = torch.zeros(BUCKETS[-1], config.hidden_size, dtype=self.dtype, device=self.device)
        self.passes = Passes({None}, self.device, states, required)
        # Created at the first pass: only then are the weights at their final address.
        self._native = functools.cache(lambda: native_head(module, embedding, output))

    @classmethod
    def load(cls, folder: Path, target: ModelConfig, feature_layers: tuple[int, ...] = ()) -> DraftHead:
        """Read a head, and the rows it lacks from its target.

        Args:
            target: the head uses its device and dtype, and must capture its passes if the target must.
            feature_layers: replace those that the head's config.json names, unless empty.

        Raises:
            ConfigError: head or target cannot be read, or they do not match.
        """
        model = resolve_model(target.model)
        try:
            module, embedding, output, draft_ids = _read(folder, model, feature_layers)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ConfigError(f"cannot load the draft head {folder}: {one_line(error)}") from error
        parts = nn.ModuleDict({"module": module, "output": _linear(output), "embedding": embedding})
        parts.to(torch_device(target.device), torch_dtype(target, model))
        pack_linear_layers(parts, "int8", target.arithmetic)  # A guess needs no exact weights.
        gather_weights(parts)
        return cls(folder.name, module, embedding, parts["output"], draft_ids, target.cuda_graphs == "require")

    def new_cache(self, num_tokens: int | Literal["auto"], block_tokens: int | Literal["auto"]) -> KVCache:
        """An empty KV cache for this head; see `KVCache.sized` for "auto" and errors."""
        return KVCache.sized(self.layers, num_tokens, block_tokens, self.dtype, self.device)

    @property
    def vocab_size(self) -> int:
        """The target's vocabulary size."""
        return self._embedding.num_embeddings

    @torch.inference_mode()
    def states(self, features: Tensor) -> Tensor:
        """States [n, hidden] from the target's features [n, feature_width]."""
        native = self._native() if features.is_cpu else None
        states = None if native is None else native.states(features)
        return self._module.states(features.to(self.device, self.dtype)) if states is None else states

    @torch.inference_mode()
    def top_drafts(self, logits: Tensor, rows: list[Row], k: int) -> tuple[Tensor, Tensor]:
        """`lm.sampling.top_drafts` of `logits` [rows, draft_vocab_size], as the target's token ids."""
        if all(row.is_argmax for row in rows):
            columns, probs = top_drafts(logits, rows, min(k, len(self.draft_ids)))
            return self.draft_ids.take(columns), probs
        # Noise and penalties are keyed by the target's token ids.
        full = logits.new_full((len(logits), self.vocab_size), -torch.inf)
        return top_drafts(full.index_copy_(1, self.draft_ids, logits), rows, min(k, len(self.draft_ids)))

    @torch.inference_mode()
    def forward(self, sequences: list[PackedSequence], states: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """One pass over all sequences' new tokens, whose KV is appended to each one's scratch.

        Args:
            states: [tokens, hidden], of each new token's predecessor.

        Returns:
            Logits float32 [rows, draft_vocab_size] of the wanted tokens, and the output states [tokens, hidden] of all.

        Raises:
            ValueError: as `LanguageModel.forward`.
        """
        logits, out = self.passes.run(self._run, sequences, cache, states)
        return logits.float(), out

    def capture(self, cache: KVCache) -> None:
        """As `LanguageModel.capture`."""
        self.passes.capture(self._run, cache)

    def _run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        states: Tensor | None,
        rows: Tensor | None,
        context: AttentionContext,
    ) -> Outputs:
        """The `Body` of its passes: logits and output states."""
        assert states is not None
        if isinstance(context, NativeAttention) and (native := self._native()) is not None:
            assert rows is not None
            turns = self._module.rotary_emb(states, positions[None])
            return native.forward(token_ids, turns, states, rows, context)
        out, final = self._module(self._embedding(token_ids)[None], states[None], positions[None], context)
        return self._output(final[0] if rows is None else final[0][rows]), out[0]


def load_plain(target: ModelConfig) -> PreTrainedModel:
    """The target on the CPU, with unmodified transformers layers.

    Raises:
        ConfigError, OSError, ValueError: it cannot be read.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_model(target.model)
    with no_progress_bars():
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch_dtype(target, folder),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )


def shared_layers(hf: PreTrainedModel, draft_ids: Tensor) -> tuple[nn.Embedding, nn.Linear]:
    """The target's embedding, and the rows of its output head for `draft_ids`, frozen."""
    embedding: Any = hf.get_input_embeddings()
    full: Any = hf.get_output_embeddings()
    return embedding.requires_grad_(False), _linear(full.weight.detach()[draft_ids])


def _read(
    folder: Path, model: Path, feature_layers: tuple[int, ...]
) -> tuple[HeadModule, nn.Embedding, Tensor, Tensor]:
    """A head's trained layers, embedding, output rows, and the target token id of each row."""
    target = target_shape(model)
    config, tensors = read_config(folder, target.num_hidden_layers, feature_layers), read_tensors(folder)
    if (config.target_hidden_size, config.target_vocab_size) != (target.hidden_size, target.vocab_size):
        raise ConfigError(
            f"the draft head {folder} is for a target of hidden size {config.target_hidden_size} and "
            f"{config.target_vocab_size} tokens, not for {model.name} ({target.hidden_size}, {target.vocab_size})"
        )
    draft_ids = pop_draft_ids(folder, tensors, config)
    with torch.device("meta"):
        wanted = HeadModule(config).state_dict()
        wanted |= {OUTPUT: torch.empty(config.draft_vocab_size, config.hidden_size)}
        wanted |= {EMBEDDING: torch.empty(config.target_vocab_size, config.hidden_size)}
    if EMBEDDING not in tensors:
        tensors[EMBEDDING] = input_embedding(model, target)
    if OUTPUT not in tensors and config.draft_vocab_size == config.target_vocab_size:
        tensors[OUTPUT] = output_rows(model, target)[draft_ids]
    check_tensors(folder, tensors, wanted)
    embedding = nn.Embedding.from_pretrained(tensors.pop(EMBEDDING))
    output = tensors.pop(OUTPUT)
    module = HeadModule(config)
    module.load_state_dict(tensors)
    sha256 = config.vocabulary_sha256 or vocabulary_sha256(load_tokenizer(model))
    module.config = replace(config, vocabulary_sha256=sha256)
    # A head drafts at every position its target reaches; its own limit only says how far it was trained.
    module.fuse(target.max_position_embeddings)
    return module, embedding, output, draft_ids


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def save_head(folder: Path, module: HeadModule, output: Tensor, draft_ids: Tensor) -> None:
    """Write a head; `output` [draft_vocab_size, hidden_size] are its output rows."""
    write_head(folder, module.config, module.state_dict() | {OUTPUT: output}, draft_ids)
