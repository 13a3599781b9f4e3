"""Hidden states of a target, recorded while it runs: the input of a draft head."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treeline.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FeatureTap:
    """Keeps the hidden states of every pass at given boundaries between the target's layers.

    Boundary k >= 1 comes after the first k layers. One more boundary comes after the final norm: the input of the
    output head. Example: a target of 30 layers has boundaries 1 to 30, and 31 for the normed states.

    Attributes:
        layers: the boundaries, in the requested order.
        width: features per token: hidden size times boundaries.
    """

    def __init__(self, hf: PreTrainedModel, layers: tuple[int, ...]) -> None:
        """Raises ConfigError if this architecture does not expose its layers as `layers`, or has no such boundary."""
        body = hf.base_model
        blocks = getattr(body, "layers", None)
        if not isinstance(blocks, nn.ModuleList):
            raise ConfigError(f"{type(hf).__name__} does not expose its decoder layers; no head can read features")
        if not all(1 <= layer <= len(blocks) + 1 for layer in layers):
            raise ConfigError(f"a head needs features after layers {[*layers]}; the target has {len(blocks)}")
        self.layers = layers
        self.width = hf.config.get_text_config().hidden_size * len(layers)
        self._parts: dict[int, Tensor] = {}
        outputs = [*blocks, body]
        self._hooks = [outputs[k - 1].register_forward_hook(functools.partial(self._keep, k)) for k in layers]
        self._readers = 1

    def take(self) -> Tensor:
        """The last pass' features [tokens, width] in the model's dtype, boundaries in order."""
        return torch.cat(self.parts(), dim=-1)

    def parts(self) -> list[Tensor]:
        """The same per boundary, each [tokens, hidden]. The caller then owns them; empty once taken."""
        parts, self._parts = self._parts, {}
        return [parts[layer] for layer in self.layers] if parts else []

    def put(self, parts: list[Tensor]) -> None:
        """Set the last pass's parts, which a captured pass returns: it does not run the hooked modules."""
        self._parts = dict(zip(self.layers, parts, strict=False))

    @property
    def is_open(self) -> bool:
        return self._readers > 0

    def shared(self) -> FeatureTap:
        """This tap for one more reader, which must take the parts right after its passes."""
        self._readers += 1
        return self

    def close(self) -> None:
        """One reader stops reading."""
        self._readers -= 1
        if not self._readers:
            self.remove()

    def remove(self) -> None:
        """All readers stop reading."""
        self._readers = 0
        for hook in self._hooks:
            hook.remove()

    def _keep(self, layer: int, module: nn.Module, args: object, output: object) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]  # type: ignore[index]
        self._parts[layer] = hidden[0]
