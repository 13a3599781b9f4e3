"""Weights in fewer bytes than float32: bfloat16, or as in GGUF files 4 or 8 bits in groups of 32 neighbours that share
a scale.

Group formats have their GGUF names: Q4_0, Q4_1 and Q8_0, whose scales take 2 bytes. Any other (Q5_0, Q4_K, Q5_K, Q6_K)
has scales and minima of 4 bytes here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

GROUP = 32
UNIT = 2.0**-48
"""All values are multiples of it: float16 scales of 2^-24, bfloat16 scales down to 2^-41."""
CACHED_NUMBERS = 1 << 17
"""Numbers of a matrix searched for groups at a time, so that intermediate results stay in the processor's cache. The
default model takes 1.1 s on one core; 2.0 s with whole matrices at a time."""
STEP_ROWS = 1024
"""Rows searched for steps at a time, which takes 50 bytes a weight."""
TILE_ROWS = 32
"""As in the kernel's layout (`lm/kernels/linear.c`)."""

Bits = Literal[4, 8, 16]


@dataclass(frozen=True)
class GroupedWeight:
    """A matrix: scale * codes + minimum, in float32 and rounded once.

    Attributes:
        codes: uint8 [rows, groups, 32], or int32 with 16 bits; below 2^bits.
        scale: float16 [rows, groups], or float32, with which the sum is exact.
        minimum: like the scale; None for 8 bits and float16, where it is -128 * scale.
    """

    bits: Bits
    codes: Tensor
    scale: Tensor
    minimum: Tensor | None

    @property
    def scale_bytes(self) -> int:
        return self.scale.element_size()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.codes.shape[0], self.codes.shape[1] * self.codes.shape[2]

    def floats(self) -> Tensor:
        """float32 [rows, columns]."""
        if self.minimum is not None and self.scale_bytes == 4:
            exact = self.scale.double()[..., None] * self.codes + self.minimum.double()[..., None]
            return exact.float().flatten(1)
        scale, codes = self.scale.float()[..., None], self.codes.float()
        # Products of codes and scales are exact.
        value = scale * (codes - 128) if self.minimum is None else scale * codes + self.minimum.float()[..., None]
        return value.flatten(1)

    def tiles(self) -> Tensor:
        """uint8 [tiles, groups, bytes]: the layout of the kernel; rows beyond the last one are zero."""
        parts = [self.scale[..., None], self._words()]
        if self.minimum is not None:
            parts.insert(1, self.minimum[..., None])
        return torch.cat([_tiled(part) for part in parts], dim=2)

    def _words(self) -> Tensor:
        """int32 [rows, groups, bits]: codes side by side, the first one lowest."""
        codes = self.codes.to(torch.int16) if self.bits == 16 else self.codes
        if self.bits == 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        return codes.view(torch.int32)


@dataclass(frozen=True)
class Bfloat16Weight:
    """A matrix of bfloat16 [rows, columns], the columns in whole groups."""

    values: Tensor
    bits: ClassVar[int] = 16
    scale_bytes: ClassVar[int] = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.values.shape[0], self.values.shape[1]

    def tiles(self) -> Tensor:
        """uint8 [tiles, groups, bytes]: as `GroupedWeight.tiles`; a word has two neighbours, the first one lowest."""
        return _tiled(self.values.view(torch.int32).unflatten(1, (-1, GROUP // 2)))


def find_smaller(weight: Tensor) -> GroupedWeight | Bfloat16Weight | None:
    """A float32 matrix [rows, columns] in groups or in bfloat16, without the loss of a single bit; else None."""
    return find_groups(weight) or find_bfloat16(weight) or find_steps(weight)


def find_bfloat16(weight: Tensor) -> Bfloat16Weight | None:
    """The bfloat16 numbers that a float32 matrix [rows, columns] was made from, if any; else None."""
    if weight.dtype != torch.float32 or weight.shape[1] % GROUP:
        return None
    values = weight[:1].bfloat16()
    if not torch.equal(values.float(), weight[:1]):
        return None
    values = weight.bfloat16()
    return Bfloat16Weight(values) if torch.equal(values.float(), weight) else None


def find_steps(weight: Tensor) -> GroupedWeight | None:
    """Groups with float32 scales that hold a float32 matrix [rows, columns] without loss; None if there are none.

    A group's scale is the greatest common divisor of its values less their minimum.
    Example: values 0.5, 1.25 and 2.0 -> minimum 0.5, scale 0.75, codes 0, 1 and 2.
    """
    if weight.dtype != torch.float32 or weight.shape[1] % GROUP:
        return None
    parts = []
    for rows in (weight[:1], *weight[1:].split(STEP_ROWS)):  # The first row settles nearly all cases.
        if (part := _steps(rows)) is None:
            return None
        parts.append(part)
    codes, scale, minimum = (torch.cat(part) for part in zip(*parts, strict=True))
    bits: Bits = 4 if codes.max() < 16 else 8 if codes.max() < 256 else 16
    return GroupedWeight(bits, codes if bits == 16 else codes.to(torch.uint8), scale, minimum)


def _steps(weight: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """int32 codes, float32 scale and minimum of each group, if codes of 16 bits are enough."""
    units = weight.unflatten(1, (-1, GROUP)).numpy() / np.float64(UNIT)
    if not (np.abs(units) < 2**62).all():
        return None
    counts = units.astype(np.int64)
    if (counts != units).any():
        return None
    least = counts.min(2, keepdims=True)
    step = np.gcd.reduce(counts - least, axis=2, keepdims=True)
    codes = (counts - least) // np.maximum(step, 1)
    scale, minimum = ((each[..., 0] * UNIT).astype(np.float32) for each in (step, least))
    if codes.max() >= 1 << 16 or (scale != step[..., 0] * UNIT).any():
        return None
    return torch.from_numpy(codes.astype(np.int32)), torch.from_numpy(scale), torch.from_numpy(minimum)


def find_groups(weight: Tensor) -> GroupedWeight | None:
    """The groups that a float32 matrix [rows, columns] was made from, without the loss of a single bit; else None."""
    if weight.dtype != torch.float32 or weight.shape[1] % GROUP:
        return None
    return next(filter(None, (_exactly(weight, each) for each in (round_to_q4_1, round_to_q4_0, round_to_q8_0))), None)


def _exactly(weight: Tensor, round_to: Callable[[Tensor], GroupedWeight]) -> GroupedWeight | None:
    """`round_to(weight)` if that loses nothing."""
    parts = []
    for rows in (weight[:1], *weight.split(-(-CACHED_NUMBERS // weight.shape[1]))):
        part = round_to(rows)  # The first row settles nearly all cases.
        if not torch.equal(part.floats(), rows):
            return None
        parts.append(part)
    first, *parts = parts
    minimum = None if first.minimum is None else torch.cat([part.minimum for part in parts])  # type: ignore[misc]
    return GroupedWeight(
        first.bits, torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts]), minimum
    )


def suits_kernels(folder: Path) -> bool:
    """Whether our kernels read a folder's safetensors in fewer bytes than float32, judged by the smallest matrix of the
    first file. Expert weights are not linear layers, and would stay in float32."""
    path = min(folder.glob("*.safetensors"), default=None)
    if path is None:
        return False
    with safe_open(path, "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.offset_keys()}
        matrices = [(math.prod(shape), name) for name, shape in shapes.items() if len(shape) == 2]
        if not matrices or any(".experts." in name for name in shapes):
            return False
        smallest = weights.get_tensor(min(matrices)[1])
        return smallest.dtype == torch.bfloat16 or find_smaller(smallest) is not None


def round_to_q4_1(weight: Tensor) -> GroupedWeight:
    """`weight` float32 [rows, whole groups] in 16 steps from each group's least value to its greatest."""
    values = weight.unflatten(1, (-1, GROUP))
    low, high = values.amin(2), values.amax(2)
    return _rounded(values, 4, ((high - low) / 15).half(), low.half())


def round_to_q4_0(weight: Tensor) -> GroupedWeight:
    """The same in 16 steps around 0. Each group's value farthest from 0 is the first step, or a later one if only that
    is lossless: the scale may come from a larger group, with a value farther away."""
    values = weight.unflatten(1, (-1, GROUP))
    farthest = values.gather(2, values.abs().argmax(2, keepdim=True))[..., 0]
    scale = first = (farthest / -8).half()
    for steps in range(7, 0, -1):
        exact = _is_exact(values, scale)
        if exact.all():
            break
        scale = torch.where(exact, scale, (farthest / -steps).half())
    scale = torch.where(_is_exact(values, scale), scale, first)
    return _rounded(values, 4, scale, -8 * scale)


def _is_exact(values: Tensor, scale: Tensor) -> Tensor:
    return (_rounded(values, 4, scale, -8 * scale).floats().view_as(values) == values).all(2)


def round_to_q8_0(weight: Tensor) -> GroupedWeight:
    """The same in 255 steps around 0, the last of which is each group's greatest magnitude."""
    values = weight.unflatten(1, (-1, GROUP))
    scale = (values.abs().amax(2) / 127).half()
    return _rounded(values, 8, scale, None)


def _rounded(values: Tensor, bits: Bits, scale: Tensor, minimum: Tensor | None) -> GroupedWeight:
    """`values` [rows, groups, 32] as the nearest codes."""
    first = -128 * scale.float() if minimum is None else minimum.float()
    steps = torch.where(scale == 0, 1.0, scale.float())[..., None]
    codes = ((values - first[..., None]) / steps).round_().clamp_(0, 2**bits - 1)
    return GroupedWeight(bits, codes.to(torch.uint8), scale, minimum)


def _tiled(part: Tensor) -> Tensor:
    """[rows, groups, n] -> uint8 [tiles, groups, bytes], the rows of a tile innermost."""
    padded = F.pad(
        part.view(torch.int16) if part.dtype == torch.float16 else part, (0, 0, 0, 0, 0, -len(part) % TILE_ROWS)
    )
    return padded.unflatten(0, (-1, TILE_ROWS)).permute(0, 2, 3, 1).contiguous().view(torch.uint8).flatten(2)
