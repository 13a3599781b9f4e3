"""Hidden states of a target, read off while it runs: what a draft head sees of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from treeline.errors import ConfigError


class FeatureTap:
    """Keeps, of every pass, the hidden states behind some layers and the normed ones that the output head reads.

    Attributes:
        layers: as asked for.
        width: features of one token: hidden size times (chosen layers + 1).
    """

    def __init__(self, hf: PreTrainedModel, layers: tuple[int, ...]) -> None:
        """`layers`: 0-based indices of the decoder layers whose output is wanted, in order.

        Raises:
            ConfigError: this architecture does not name its decoder layers as others do.
        """
        body = hf.base_model
        blocks = getattr(body, "layers", None)
        if not isinstance(blocks, nn.ModuleList) or any(layer >= len(blocks) for layer in layers):
            raise ConfigError(f"{type(hf).__name__} does not show its decoder layers; no head can read their features")
        self.layers = layers
        self.width = hf.config.get_text_config().hidden_size * (len(layers) + 1)
        self._parts: list[Tensor] = []
        self._hooks = [module.register_forward_hook(self._keep) for module in (*(blocks[i] for i in layers), body)]
        self._readers = 1

    def take(self) -> Tensor:
        """The last pass' features [tokens, width] in the model's dtype, layers in order, the normed output last."""
        return torch.cat(self.parts(), dim=-1)

    def parts(self) -> list[Tensor]:
        """The same by layer, each [tokens, hidden], which are then the caller's; empty once taken."""
        parts, self._parts = self._parts, []
        return parts

    def put(self, parts: list[Tensor]) -> None:
        """These are the last pass' parts: a captured pass runs without the modules that they are read off."""
        self._parts = parts

    @property
    def is_open(self) -> bool:
        return self._readers > 0

    def shared(self) -> FeatureTap:
        """This one, for a reader more, who takes the parts of its own passes at once."""
        self._readers += 1
        return self

    def close(self) -> None:
        """One reader reads no more."""
        self._readers -= 1
        if not self._readers:
            self.remove()

    def remove(self) -> None:
        """None of them reads any more."""
        self._readers = 0
        for hook in self._hooks:
            hook.remove()

    def _keep(self, module: nn.Module, args: object, output: object) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]  # type: ignore[index]
        self._parts.append(hidden[0])
