"""A draft head: one or few decoder layers that read a target's hidden states and guess the token after the next.

At every token it sees the token's embedding and the target's features of the token *before* (EAGLE, arXiv 2401.15077;
features of several layers: EAGLE-3, arXiv 2503.01840). Below the root there are no such features yet: a draft token
takes the head's own output at its parent in their place. Embedding and output rows are the target's own; the output
covers only the tokens that the target writes most.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lm.attention import CONTEXT, IMPLEMENTATION, AttentionContext
from lm.cpu.elementwise import TORCH, elementwise_for
from lm.cpu.packed_linear import pack_linear_layers
from lm.cuda.graphs import Outputs
from lm.cuda.layout import BUCKETS
from lm.device import torch_dtype
from lm.kv_cache import KVCache, LayerShape
from lm.layers.fuse import fuse_layers
from lm.model import torch_device
from lm.packed import PackedSequence
from lm.passes import Passes
from lm.sampling import Row, top_drafts
from lm.store import one_line, progress_bars, resolve_model
from treeline.config import ModelConfig
from treeline.errors import ConfigError

CONFIG_FILE, WEIGHTS_FILE = "head.json", "head.safetensors"


@dataclass(frozen=True)
class HeadConfig:
    """What a head is made for, and its shape.

    Attributes:
        target: name of the target, for people.
        vocabulary_sha256: of the target's tokenizer.
        feature_layers: 0-based target layers whose output it reads, besides the final normed states.
    """

    target: str
    vocabulary_sha256: str
    feature_layers: tuple[int, ...]
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    rope_theta: float
    norm_eps: float
    draft_vocab_size: int

    @property
    def feature_width(self) -> int:
        return self.hidden_size * (len(self.feature_layers) + 1)


class HeadModule(nn.Module):
    """The trained part. Embedding and output rows come from outside."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        parts = config.feature_width // size
        self.feature_norms = nn.ModuleList(LlamaRMSNorm(size, config.norm_eps) for _ in range(parts))
        self.project = nn.Linear(config.feature_width, size, bias=False)
        self.token_norm = LlamaRMSNorm(size, config.norm_eps)
        self.state_norm = LlamaRMSNorm(size, config.norm_eps)
        self.join = nn.Linear(2 * size, size, bias=False)
        llama = LlamaConfig(
            vocab_size=1,
            bos_token_id=None,
            eos_token_id=None,
            hidden_size=size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
        llama._attn_implementation = IMPLEMENTATION
        self.body = LlamaModel(llama)
        self.body.embed_tokens = None  # type: ignore[assignment]

    def states(self, features: Tensor) -> Tensor:
        """What stands for the head's own output where the target's features [n, width] are known: [n, hidden]."""
        parts = features.split(self.config.hidden_size, dim=-1)
        normed = [_norm(part, norm) for norm, part in zip(self.feature_norms, parts, strict=True)]
        return self.project(torch.cat(normed, dim=-1))

    def forward(self, embedded: Tensor, states: Tensor, positions: Tensor, context: Any) -> Tensor:
        """Output states [1, n, hidden], normed, of tokens with these embeddings and states [1, n, hidden]."""
        joined = self.join(torch.cat((_norm(embedded, self.token_norm), _norm(states, self.state_norm)), dim=-1))
        return self.body(
            inputs_embeds=joined, position_ids=positions, use_cache=False, **{CONTEXT: context}
        ).last_hidden_state


def _norm(hidden: Tensor, norm: nn.Module) -> Tensor:
    """By a kernel, unless gradients are wanted."""
    return (TORCH if torch.is_grad_enabled() else elementwise_for(hidden)).norm(hidden, norm)


class DraftHead:
    """A trained head, ready to draft for its target. Stateless between calls: all state is in the KV cache.

    Attributes:
        name: of its folder.
        draft_ids: int64 [draft_vocab_size]; the target's token of each column of logits.
        passes: how its passes are run.
    """

    def __init__(
        self, name: str, module: HeadModule, embedding: nn.Embedding, output: nn.Module, draft_ids: Tensor
    ) -> None:
        """`output`: the target's output rows of `draft_ids`."""
        self.name, self.config = name, module.config
        self.device, self.dtype = embedding.weight.device, embedding.weight.dtype
        self.draft_ids = draft_ids.to(self.device)
        self._module, self._embedding, self._output = module.eval(), embedding, output
        config = module.config
        head_dim = config.hidden_size // config.heads
        self.layers = [LayerShape(config.kv_heads, head_dim, head_dim)] * config.layers
        states = torch.zeros(BUCKETS[-1], config.hidden_size, dtype=self.dtype, device=self.device)
        self.passes = Passes({None}, self.device, states)

    @classmethod
    def load(cls, folder: Path, target: ModelConfig) -> DraftHead:
        """Read a head, and the embedding and output rows of its target.

        Raises:
            ConfigError: one of them cannot be read, or they do not belong together.
        """
        if not (folder / CONFIG_FILE).is_file():
            raise ConfigError(f"no draft head in {folder}: {CONFIG_FILE} is missing")
        try:
            described = json.loads((folder / CONFIG_FILE).read_text())
            config = HeadConfig(**described | {"feature_layers": tuple(described["feature_layers"])})
            weights = load_file(folder / WEIGHTS_FILE)
            draft_ids = weights.pop("draft_ids")
            module = HeadModule(config)
            module.load_state_dict(weights)
            embedding, output = shared_layers(load_plain(target), draft_ids)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ConfigError(f"cannot load the draft head {folder}: {one_line(error)}") from error
        if embedding.embedding_dim != config.hidden_size or embedding.num_embeddings <= int(draft_ids.max()):
            raise ConfigError(f"the draft head {folder} was made for {config.target}, not for {target.model}")
        fuse_layers(module.body)
        parts = nn.ModuleDict({"module": module, "output": output, "embedding": embedding})
        parts.to(torch_device(target.device), embedding.weight.dtype)
        pack_linear_layers(parts, "int8")  # A guess needs no exact weights.
        return cls(folder.name, module, embedding, parts["output"], draft_ids)

    def new_cache(self, num_tokens: int, block_tokens: int) -> KVCache:
        """An empty KV cache for this head."""
        return KVCache(self.layers, num_tokens, block_tokens, self.dtype, self.device)

    @property
    def vocab_size(self) -> int:
        """Of the target."""
        return self._embedding.num_embeddings

    @torch.inference_mode()
    def states(self, features: Tensor) -> Tensor:
        """States [n, hidden] from the target's features [n, feature_width]."""
        return self._module.states(features.to(self.device, self.dtype))

    @torch.inference_mode()
    def top_drafts(self, logits: Tensor, rows: list[Row], k: int) -> tuple[Tensor, Tensor]:
        """`lm.sampling.top_drafts` of `logits` [rows, draft_vocab_size], as the target's token ids."""
        if all(row.params.greedy and row.params.repetition_penalty == 1.0 for row in rows):
            columns, probs = top_drafts(logits, rows, min(k, len(self.draft_ids)))
            return self.draft_ids[columns], probs
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
        out = self._module(self._embedding(token_ids)[None], states[None], positions[None], context)[0]
        return self._output(out if rows is None else out[rows]), out


def load_plain(target: ModelConfig) -> PreTrainedModel:
    """The target on the CPU, its layers as transformers makes them.

    Raises:
        ConfigError, OSError, ValueError: it cannot be read.
    """
    folder = resolve_model(target.model)
    with progress_bars(False):
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
    output = nn.Linear(full.in_features, len(draft_ids), bias=False, device=full.weight.device, dtype=full.weight.dtype)
    output.weight = nn.Parameter(full.weight.detach()[draft_ids], requires_grad=False)
    return embedding.requires_grad_(False), output


def save_head(folder: Path, module: HeadModule, draft_ids: Tensor) -> None:
    """Write a head in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.detach().to(torch.bfloat16).contiguous().cpu() for name, weight in module.state_dict().items()
    }
    save_file(weights | {"draft_ids": draft_ids.cpu()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(asdict(module.config), indent=2) + "\n")
