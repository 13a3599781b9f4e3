"""Position-keyed noise: exactly SplitMix64, exactly Gumbel, and independent across keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from lm.noise import gumbel_noise

GAMMA = np.uint64(0x9E3779B97F4A7C15)


def finalise(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def reference_noise(seed: int, position: int, vocab_size: int) -> np.ndarray:
    """The same on unsigned integers of numpy."""
    seeds = np.array([seed % 2**64], np.uint64)
    key = finalise(finalise(seeds) + np.array([position + 1], np.uint64) * GAMMA)
    bits = finalise(key + np.arange(1, vocab_size + 1, dtype=np.uint64) * GAMMA) >> np.uint64(32)
    uniform = (bits.astype(np.float64) + 0.5) / 2**32
    return (-np.log(-np.log1p(-uniform))).astype(np.float32)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 0x123456789ABCDEF])
@pytest.mark.parametrize("position", [0, 1, 8191])
def test_equals_the_numpy_reference(seed: int, position: int) -> None:
    noise = gumbel_noise(seed, position, 5000, "cpu")
    assert noise.dtype == torch.float32
    np.testing.assert_allclose(noise.numpy(), reference_noise(seed, position, 5000), rtol=2e-7, atol=1e-7)


def test_first_value_is_splitmix64s_own() -> None:
    """1234567 seeds the published test vector of SplitMix64: 6457827717110365317 comes first."""
    assert int(finalise(np.array([1234567], np.uint64) + GAMMA)[0]) == 6457827717110365317


def test_a_token_s_noise_does_not_depend_on_threads_or_vocabulary_size() -> None:
    whole = gumbel_noise(3, 4, 100_003, "cpu")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for size in (1, 7, 1000, 65_537):
                assert torch.equal(gumbel_noise(3, 4, size, "cpu"), whole[:size])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_is_the_same_on_cuda() -> None:
    assert torch.equal(gumbel_noise(5, 6, 200_000, "cuda").cpu(), gumbel_noise(5, 6, 200_000, "cpu"))


def test_is_gumbel_distributed_and_finite_out_to_the_upper_tail() -> None:
    noise = gumbel_noise(11, 12, 1 << 22, "cpu").double().numpy()
    assert np.isfinite(noise).all()
    assert stats.kstest(noise[:100_000], stats.gumbel_r.cdf).pvalue > 0.01
    for threshold in (6.0, 9.0, 12.0):
        expected = len(noise) * stats.gumbel_r.sf(threshold)
        assert abs((noise > threshold).sum() - expected) < 4 * np.sqrt(expected)
    top = np.sort(noise)[-2000:]
    assert len(np.unique(top)) > 1990  # A 24-bit uniform would tie here by the hundred.


def test_argmax_follows_the_distribution_over_positions() -> None:
    probs = np.array([0.35, 0.25, 0.2, 0.12, 0.05, 0.02, 0.009, 0.001])
    log_probs = torch.from_numpy(np.log(probs))
    draws = [int((log_probs + gumbel_noise(99, position, 8, "cpu")).argmax()) for position in range(30_000)]
    assert stats.chisquare(np.bincount(draws, minlength=8), probs * len(draws)).pvalue > 0.01


@pytest.mark.parametrize(
    ("seeds", "positions"), [((1, 2), (5, 5)), ((1, 1), (5, 6)), ((5, 6), (6, 5)), ((0, -1), (0, 0))]
)
def test_streams_of_other_seeds_or_positions_are_unrelated(seeds: tuple[int, int], positions: tuple[int, int]) -> None:
    first, second = (
        gumbel_noise(seed, position, 20_000, "cpu").numpy() for seed, position in zip(seeds, positions, strict=True)
    )
    for shift in (0, 1, 2):
        x, y = first[shift:], second[: len(second) - shift]
        assert (x == y).mean() < 1e-3
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(len(x))


def test_consecutive_positions_of_one_token_are_independent() -> None:
    values = np.array([gumbel_noise(7, position, 3, "cpu").numpy() for position in range(20_000)])
    for token in range(3):
        assert abs(np.corrcoef(values[:-1, token], values[1:, token])[0, 1]) < 4 / np.sqrt(len(values))
