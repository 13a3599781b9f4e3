"""A model's weights split for tensor parallelism (Megatron-LM, arXiv 1909.08053): each rank holds some heads, some of
the feed-forward part and some rows of the output head. The outputs of attention and feed-forward part are summed over
the ranks, so that each rank has complete hidden states and logits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm.layers.fuse import is_fusable
from treeline.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """One rank of `size` that share a model."""

    rank: int = 0
    size: int = 1

    def of(self, count: int, what: str) -> slice:
        """This rank's part. Raises ConfigError if the parts would be unequal."""
        part, rest = divmod(count, self.size)
        if rest:
            raise ConfigError(f"tensor_parallel: {self.size} ranks cannot share {count} {what}")
        return slice(self.rank * part, (self.rank + 1) * part)


class SummedLinear(nn.Module):
    """A linear layer split by input columns over the ranks."""

    def __init__(self, linear: nn.Linear, columns: slice, size: int) -> None:
        super().__init__()
        bias = linear.bias if columns.start == 0 else None  # It is to be added once.
        self.linear = _linear(linear.weight[:, columns], bias)
        self.in_features, self.out_features = self.linear.in_features, self.linear.out_features
        self._size = size

    def forward(self, inputs: Tensor) -> Tensor:
        partial = self.linear(inputs)
        if self._size == 2:  # The sum of two is the same in any order.
            dist.all_reduce(partial)
            return partial
        # A ring adds in an order that depends on a token's place in the pass, which would change its bits.
        return functools.reduce(torch.add, gathered(partial, self._size))


class GatheredLinear(nn.Module):
    """A linear layer split by output rows over the ranks, padded to equal parts."""

    def __init__(self, linear: nn.Linear, shard: Shard) -> None:
        super().__init__()
        self.out_features, self._size = linear.out_features, shard.size
        count = -(-linear.out_features // shard.size)
        rows = torch.arange(shard.rank * count, (shard.rank + 1) * count).clamp(max=linear.out_features - 1)
        self.linear = _linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows])

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat(gathered(self.linear(inputs), self._size), dim=-1)[..., : self.out_features]


def gathered(own: Tensor, size: int) -> tuple[Tensor, ...]:
    """Each rank's tensor, in rank order."""
    parts = own.new_empty(size * len(own), *own.shape[1:])
    # torch 2.13 renamed it.
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(parts, own)
    return parts.view(size, *own.shape).unbind(0)


@torch.no_grad()
def keep_shard(hf: PreTrainedModel, shard: Shard) -> None:
    """Keep only this rank's weights in a model with unmodified transformers layers.

    Raises:
        ConfigError: its layers cannot be fused, or the ranks cannot share its heads.
    """
    if not is_fusable(hf):
        raise ConfigError(f"tensor_parallel: {type(hf).__name__} is not supported")
    for layer in hf.base_model.layers:  # type: ignore[union-attr]
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        kv_heads = shard.of(attention.k_proj.out_features // attention.head_dim, "key/value heads")
        group = attention.q_proj.out_features // attention.k_proj.out_features * attention.head_dim
        keys, queries = _scaled(kv_heads, attention.head_dim), _scaled(kv_heads, group)
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            setattr(attention, name, _rows(getattr(attention, name), rows))
        attention.o_proj = SummedLinear(attention.o_proj, queries, shard.size)
        hidden = shard.of(mlp.gate_proj.out_features, "rows of the feed-forward part")
        mlp.gate_proj, mlp.up_proj = _rows(mlp.gate_proj, hidden), _rows(mlp.up_proj, hidden)
        mlp.down_proj = SummedLinear(mlp.down_proj, hidden, shard.size)
    head: Any = hf.get_output_embeddings()
    hf.set_output_embeddings(GatheredLinear(head, shard))


def _scaled(part: slice, by: int) -> slice:
    return slice(part.start * by, part.stop * by)


def _rows(linear: nn.Linear, rows: slice) -> nn.Linear:
    return _linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Copies, so that the whole weight can be freed."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear
