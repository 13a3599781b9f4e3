"""A leaner decoder layer for models like Llama: fewer, larger matrix products and one multiplication per rotation.

Rotary embedding rotates dimension i of a head together with dimension i + d/2. Here the rows of the query and key
weights are reordered so that such pairs are adjacent, and a rotation is one complex multiplication. Attention scores
sum over pairs, so the order does not change them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lm.attention import CONTEXT, AttentionContext, AttentionOptions
from lm.cpu.elementwise import TORCH, Elementwise, elementwise_for
from lm.cpu.native import LANES

LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")
"""Types of rotary embedding whose angles change once a sequence of the batch is long."""
FIRST_POSITIONS = 1024
SHIFTED_NORMS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")
"""Classes of transformers, by name: a drafter that runs a head does not load it."""


class FusedLayer(nn.Module):
    """A decoder layer of Llama, Mistral, Qwen 2 and 3, or Gemma 1 to 3, for inference.

    Attributes:
        head_norms: of queries and of keys, before rotation (Qwen3, Gemma 3).
        post_norms: of the outputs of attention and feed-forward part (Gemma 2 and 3).
        turned_by: which of the model's rotary embeddings rotates its heads.
    """

    def __init__(self, layer: Any, window: int | None, softcap: float | None = None, turned_by: str = "all") -> None:
        """`layer`: whose weights are taken; `window` and `softcap` as in `AttentionOptions`."""
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.index: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.options = AttentionOptions(attention.scaling, softcap, window)
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.heads = [projection.out_features // self.head_dim for projection in projections]
        queries, keys, values = self.heads
        pairs = torch.arange(self.head_dim).view(2, -1).T.flatten()
        turned = (torch.arange(queries + keys)[:, None] * self.head_dim + pairs).flatten()
        still = torch.arange((queries + keys) * self.head_dim, (queries + keys + values) * self.head_dim)
        self.qkv_proj = _joined(projections, torch.cat((turned, still)))
        self.o_proj = attention.o_proj
        self.gate_up_proj = _joined([mlp.gate_proj, mlp.up_proj])
        self.down_proj, self.activation = mlp.down_proj, mlp.act_fn
        heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.head_norms = nn.ModuleList(Norm(norm, pairs) for norm in heads) if all(heads) else None
        names = ["input_layernorm", "post_attention_layernorm"]
        if post := hasattr(layer, "pre_feedforward_layernorm"):
            names = [names[0], "pre_feedforward_layernorm", names[1], "post_feedforward_layernorm"]
        self.input_norm, self.mlp_norm, *others = (Norm(getattr(layer, name)) for name in names)
        self.post_norms = nn.ModuleList(others) if post else None
        self.turned_by = turned_by
        sizes = (self.o_proj.out_features, self.head_dim, mlp.down_proj.in_features)
        self.whole_lanes = all(size % LANES == 0 for size in sizes)

    def forward(self, hidden_states: Tensor, position_embeddings: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states [1, tokens, hidden] -> the same; position_embeddings as `ComplexRotary` gives them."""
        context: AttentionContext = kwargs[CONTEXT]
        normed = self._work(hidden_states, context).norm(hidden_states, self.input_norm)
        return self.mix(normed, hidden_states, position_embeddings, context)

    def mix(self, inputs: Tensor, hidden_states: Tensor, turns: Tensor, context: AttentionContext) -> Tensor:
        """Attention over normed `inputs` and the feed-forward part, both added to `hidden_states`."""
        work = self._work(hidden_states, context)
        queries, keys, _ = self.heads
        heads = self.qkv_proj(inputs).view(-1, sum(self.heads), self.head_dim)
        rotate_and_attend = getattr(context, "rotate_and_attend", None) if work is _kernels(context) else None
        if rotate_and_attend is not None:
            mixed = rotate_and_attend(self.index, heads, self.heads, turns, self.options, self.head_norms)
        else:
            if self.head_norms is not None:
                parts = heads.split_with_sizes(self.heads, 1)
                plain = [work.norm(part, norm) for part, norm in zip(parts, self.head_norms, strict=False)]
                heads = torch.cat((*plain, parts[2]), dim=1)
            heads = work.rotate(heads, queries + keys, turns)
            query, key, value = heads.split_with_sizes(self.heads, 1)
            mixed = context.attend(self.index, query, key, value, self.options)
        attended = self.o_proj(mixed.reshape(1, mixed.shape[0], -1))
        after_attention, after_mlp = self.post_norms or (None, None)
        hidden_states, normed = work.add_norm(hidden_states, attended, self.mlp_norm, after_attention)
        return work.add(
            hidden_states, self.down_proj(work.gated(self.gate_up_proj(normed), self.activation)), after_mlp
        )

    def _work(self, hidden_states: Tensor, context: AttentionContext) -> Elementwise:
        return _kernels(context) or (elementwise_for(hidden_states) if self.whole_lanes else TORCH)


def _kernels(context: AttentionContext) -> Elementwise | None:
    """Kernels of a padded pass on a GPU."""
    return getattr(context, "work", None)


class Norm(nn.Module):
    """An RMS norm as the kernels read it: for Gemma, which multiplies by 1 + weight, the sum is kept in float32.

    `order`: of the row's numbers, if not the norm's own.

    Attributes:
        rounds: it feeds an 8-bit product, so a kernel may output rounded numbers.
    """

    rounds = False

    def __init__(self, norm: Any, order: Tensor | None = None) -> None:
        super().__init__()
        shifted = type(norm).__name__ in SHIFTED_NORMS
        weight = 1 + norm.weight.float() if shifted else norm.weight
        self.weight = nn.Parameter(weight if order is None else weight[order], requires_grad=False)
        self.variance_epsilon: float = norm.eps if shifted else norm.variance_epsilon


class ComplexRotary(nn.Module):
    """A rotary embedding's rotations as complex numbers, computed once per position unless they depend on length.

    Args:
        max_positions: of the model.
        layer_type: of the layers that it rotates, if the embedding has several.
    """

    def __init__(self, rotary: Any, max_positions: int, layer_type: str | None = None) -> None:
        super().__init__()
        self.rotary, self.max_positions = rotary, max_positions
        self._more = () if layer_type is None else (layer_type,)
        self._rope_type: str = rotary.rope_type if layer_type is None else rotary.rope_type[layer_type]
        self._turns_at = torch.empty(0)

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        """complex64 [tokens, 1, head_dim / 2]."""
        if self._rope_type in LENGTH_DEPENDENT_ROPE:
            return self._turns(hidden_states, position_ids)
        # Reading the largest position from a device would wait for it, so all positions of the model are covered.
        needed = max(position_ids[0].tolist()) + 1 if hidden_states.is_cpu else self.max_positions
        if needed > len(self._turns_at):
            ahead = max(FIRST_POSITIONS, 2 * needed) if hidden_states.is_cpu else needed
            self._turns_at = self._turns(hidden_states, torch.arange(ahead, device=hidden_states.device)[None])
        return self._turns_at.index_select(0, position_ids[0])

    def _turns(self, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        cos, sin = self.rotary(hidden_states.float(), position_ids, *self._more)
        half = cos.shape[-1] // 2
        return torch.complex(cos[0, :, None, :half], sin[0, :, None, :half])


def _joined(projections: list[nn.Linear], order: Tensor | None = None) -> nn.Linear:
    """One layer with the outputs of all `projections`, rows in this order."""
    rows = slice(None) if order is None else order
    weight = torch.cat([projection.weight for projection in projections])[rows]
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if projections[0].bias is not None:
        bias = torch.cat([projection.bias for projection in projections])[rows]
        joined.bias = nn.Parameter(bias, requires_grad=False)
    return joined
