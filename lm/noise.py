"""Position-keyed noise: counter-based, so that one seed gives the same token on any path, batch and device."""

from __future__ import annotations

import torch

GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def gumbel_noise(seed: int, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    """Gumbel noise float32, of `token_ids`' shape (int64), keyed by (seed, position, token id).

    SplitMix64 (Steele, Lea, Flood 2014) over a counter: state = key + (token + 1) * golden. `position` is the absolute
    index of the token to be placed. The upper tail, which decides who wins, has the full resolution of 32 bits.
    """
    key = splitmix64(splitmix64(seed & _MASK) ^ (position & _MASK))
    state = (token_ids + 1) * _signed(GOLDEN) + _signed(key)
    state = (state ^ _shift(state, 30)) * _signed(_MIX_1)
    state = (state ^ _shift(state, 27)) * _signed(_MIX_2)
    bits = _shift(state ^ _shift(state, 31), 32)
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    exponential = -torch.log1p(-uniform.clamp(max=1 - 2.0**-24))
    return -torch.log(exponential)


def splitmix64(value: int) -> int:
    """One SplitMix64 output of `value` as state, on plain integers."""
    value = (value + GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64, which torch shifts arithmetically."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
