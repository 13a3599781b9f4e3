"""A decoder-only language model of transformers, run over packed sequences and our own KV cache."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from lm.attention import NAME as ATTENTION
from lm.kv_cache import KVCache
from lm.packed import PackedSequence, pack
from lm.store import load_tokenizer, resolve_model
from treeline.config import ModelConfig
from treeline.errors import ConfigError

UNBOUNDED_CONTEXT_TOKENS = 1 << 20


class LanguageModel:
    """Attributes:
    name: name under which it is served.
    hf: the transformers model, with our attention in place of its own.
    vocab_size: width of the logits.
    max_context_tokens: positions the model was made for.
    eos_token_ids: tokens that end an answer.
    """

    def __init__(self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
        self.hf = hf.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        config = hf.config.get_text_config()
        self.device, self.dtype = hf.device, hf.dtype
        self.architecture = type(hf).__name__
        self.vocab_size: int = hf.get_output_embeddings().weight.shape[0]
        self.max_context_tokens: int = getattr(config, "max_position_embeddings", None) or UNBOUNDED_CONTEXT_TOKENS
        self.eos_token_ids = _eos_token_ids(hf, tokenizer)
        self._layers: int = config.num_hidden_layers
        self._kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @classmethod
    def load(cls, config: ModelConfig) -> LanguageModel:
        """Resolve, load and place a model.

        Raises:
            ConfigError: it cannot be had, or is not a decoder that tree attention can serve.
        """
        if config.threads:
            torch.set_num_threads(config.threads)
        device = _device(config.device)
        folder = resolve_model(config.model)
        tokenizer = load_tokenizer(folder)
        _check_supported(_read_config(folder))
        try:
            hf = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, config.dtype),
                attn_implementation=ATTENTION,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load {config.model}: {' '.join(str(error).split())[:300]}") from None
        return cls(hf.to(device), tokenizer, config.name or folder.name)

    @classmethod
    def from_hf(cls, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str = "model") -> LanguageModel:
        """Wrap a model that is loaded already; its attention is replaced."""
        _check_supported(hf.config)
        hf.set_attn_implementation(ATTENTION)
        return cls(hf, tokenizer, name)

    def new_cache(self, num_tokens: int, block_tokens: int) -> KVCache:
        """An empty KV cache of this model's shape, for `num_tokens` tokens of all sequences together."""
        return KVCache(self._layers, self._kv_heads, self._head_dim, num_tokens, block_tokens, self.dtype, self.device)

    @torch.inference_mode()
    def forward(self, sequences: list[PackedSequence], cache: KVCache) -> torch.Tensor:
        """Run all sequences' new tokens in one pass; they become scratch.

        Returns:
            Logits float32 [rows, vocab], in order of sequences, then of each one's wanted tokens.
        """
        packed = pack(sequences, self.device)
        logits = self.hf(
            input_ids=packed.token_ids[None],
            position_ids=packed.positions[None],
            use_cache=False,
            logits_to_keep=packed.rows,
            packed_pass=packed,
            kv_cache=cache,
        ).logits[0]
        for sequence in sequences:
            sequence.cache.scratch += len(sequence.token_ids)
        return logits.float()


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' is configured, but this machine has no CUDA device")
    return torch.device(wanted)


def _read_config(folder: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the model in {folder}: {' '.join(str(error).split())[:300]}") from None


def _check_supported(config: PreTrainedConfig) -> None:
    """Refuse what a KV cache with tree masks cannot serve."""
    text = config.get_text_config()
    kind = getattr(config, "model_type", "model")
    layer_types = set(getattr(text, "layer_types", None) or [])
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"'{kind}' is an encoder-decoder; only decoder-only models can be served")
    if layer_types - {"full_attention", "sliding_attention"} or not hasattr(text, "num_attention_heads"):
        raise ConfigError(f"'{kind}' has layers that are not plain attention; they cannot be speculated with trees")


def _eos_token_ids(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    found: set[int] = set()
    for value in (
        hf.config.eos_token_id,
        hf.generation_config and hf.generation_config.eos_token_id,
        tokenizer.eos_token_id,
    ):
        found.update([value] if isinstance(value, int) else value or [])
    return frozenset(found)
