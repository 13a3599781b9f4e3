"""The kernels on an ARM processor, which qemu plays: the same bits as everywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lm.cpu.grouped_linear import GroupedLinear, Kernel
from lm.cpu.quantized import GroupedWeight, round_to_q4_1
from tests.lm.cpu.test_integer import ROUNDING, extremes, reference

ROOT = Path(__file__).parents[3]
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
# As setup.py compiles them, but -O1: -O3 takes ten times as long. Products and sums are fused as with -O3.
FLAGS = ["-O1", "-fexpensive-optimizations", "-fno-math-errno", "-fopenmp", "-static", "-Ilm/kernels"]
ENVIRONMENT = os.environ | {"LD_PRELOAD": ""}
"""Without the sanitizers of .ci/sanitize, which are for this machine's own processor."""

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"{COMPILER} or {EMULATOR} is not installed"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kernels and `product.c`."""
    built, sources = tmp_path_factory.mktemp("arm") / "product", [str(p) for p in ROOT.glob("lm/kernels/**/*.c")]
    subprocess.run(
        [COMPILER, *FLAGS, "-o", built, *sources, "tests/lm/cpu/arm/product.c", "-lm"],
        cwd=ROOT,
        env=ENVIRONMENT,
        check=True,
    )
    return built


def products(program: Path, weight: GroupedWeight, inputs: torch.Tensor, kernel: Kernel) -> NDArray[np.float32]:
    tiles, (rows, columns) = weight.tiles().numpy(), weight.shape
    head = [weight.bits, weight.scale_bytes, columns, rows, len(inputs), kernel, tiles.nbytes]
    given = np.array(head, np.int64).tobytes() + tiles.tobytes() + inputs.numpy().tobytes()
    done = subprocess.run(
        [EMULATOR, program], input=given, capture_output=True, check=True, timeout=60, env=ENVIRONMENT
    )
    return np.frombuffer(done.stdout, np.float32).reshape(-1, rows)


@pytest.mark.parametrize("name", ROUNDING)
def test_every_bit_is_that_of_the_reference(name: str, program: Path) -> None:
    rng = np.random.default_rng(0)
    for tokens in (1, 3, 5, 12):
        rows, groups = (int(rng.integers(1, most)) for most in (100, 8))
        weight, inputs = ROUNDING[name](torch.randn(rows, 32 * groups) * 0.05), torch.randn(tokens, 32 * groups)
        assert np.array_equal(products(program, weight, inputs, Kernel.NEON), reference(weight, inputs))


def test_extreme_numbers_are_summed_exactly(program: Path) -> None:
    for weight, inputs in extremes():
        assert np.array_equal(products(program, weight, inputs, Kernel.NEON), reference(weight, inputs))


def test_products_of_floats_have_the_bits_of_other_processors(program: Path) -> None:
    weight, inputs = round_to_q4_1(torch.randn(70, 96) * 0.05), torch.randn(7, 96)
    expected = GroupedLinear(weight, None, Kernel.FLOAT32)(inputs).numpy()
    assert np.array_equal(products(program, weight, inputs, Kernel.FLOAT32), expected)


def test_other_processors_kernels_do_not_run(program: Path) -> None:
    weight, inputs = round_to_q4_1(torch.randn(32, 32)), torch.randn(1, 32)
    for kernel in (Kernel.FLOAT32_WIDE, Kernel.AVX2, Kernel.AVX_VNNI, Kernel.AVX512_VNNI):
        assert not products(program, weight, inputs, kernel).size
