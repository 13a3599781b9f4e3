"""Position-keyed Gumbel noise: a pure function of (seed, position, token id), independent of the batch.

Counter-based: output i of SplitMix64 (Steele, Lea and Flood, 2014) started at a key mixed from seed and position. The
integers are exact everywhere; the logarithms are taken in float64 and rounded once, so devices agree.
"""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def gumbel_noise(seed: int, position: int, vocab_size: int, device: torch.device | str) -> torch.Tensor:
    """Standard Gumbel noise float32 [vocab_size] on `device`.

    g = -log(-log(1 - v)), v = (upper 32 bits + 1/2) / 2^32: v near 0 gives the largest g, resolved with all 32
    bits.

    Args:
        seed: any integer; its lower 64 bits are used.
        position: absolute index in the sequence of the token to be chosen.
    """
    counters = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=device)
    state = counters * _signed(_GAMMA) + signed_key(seed, position)
    state = (state ^ _shifted(state, 30)) * _signed(_FACTORS[0])
    state = (state ^ _shifted(state, 27)) * _signed(_FACTORS[1])
    uniform = (_shifted(state ^ _shifted(state, 31), 32).double() + 0.5) * 2.0**-32
    return uniform.neg_().log1p_().neg_().log_().neg_().float()


def signed_key(seed: int, position: int) -> int:
    """Start of the counters of this seed and position, as an int64."""
    return _signed(_finalise(_finalise(seed & _MASK) + (position + 1) * _GAMMA & _MASK))


def _finalise(state: int) -> int:
    """SplitMix64's finaliser on 64 bits."""
    state = (state ^ (state >> 30)) * _FACTORS[0] & _MASK
    state = (state ^ (state >> 27)) * _FACTORS[1] & _MASK
    return state ^ (state >> 31)


def _shifted(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift; torch's own carries the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value
