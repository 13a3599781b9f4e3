"""OpenVINO's weights put right: zero points that give back what the GGUF file says, row by row."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize

from bench.peers.openvino import put_zeros_right, row_zeros

ROWS, GROUPS = 6, 3


@pytest.fixture
def weights():
    """float32 [6, 96]; one row is all zeros, as are its scales."""
    drawn = np.random.default_rng(0).normal(size=(ROWS, GROUPS * 32)).astype(np.float32)
    drawn[2] = 0
    return drawn


@pytest.fixture
def packed(weights):
    return quantize(weights, GGMLQuantizationType.Q4_1)


@pytest.fixture
def gguf(tmp_path, weights, packed):
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("a.weight", packed, raw_dtype=GGMLQuantizationType.Q4_1)
    writer.add_tensor("b.weight", quantize(weights, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def unpacked(packed):
    """Scales float16 [rows, groups] and q uint8 [rows, groups, 32]."""
    blocks = packed.reshape(ROWS, GROUPS, 20)
    nibbles = blocks[..., 4:]
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    return scale, np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)


def test_zero_points_give_back_the_files_weights(gguf, packed):
    scale, q = unpacked(packed)
    zeros = row_zeros(gguf)
    assert len(zeros) == ROWS  # none of the Q8_0 tensor
    zero = np.stack([zeros[row.tobytes()] for row in scale])
    assert not np.array_equal(zero, np.round(zero))
    read = scale[..., None] * (q - zero[..., None].astype(np.float32))
    exact = dequantize(packed, GGMLQuantizationType.Q4_1)
    assert np.abs(read.reshape(exact.shape) - exact).max() < 0.01 * scale.max()


def test_a_model_with_rounded_zero_points_in_another_order_of_rows_is_put_right(gguf, packed):
    openvino = pytest.importorskip("openvino")
    from openvino import opset13

    scale, q = unpacked(packed)
    order = np.asarray([3, 0, 5, 2, 1, 4])
    exact = dequantize(packed, GGMLQuantizationType.Q4_1)[order].reshape(ROWS, GROUPS, 32)
    rounded = np.round([row_zeros(gguf)[row.tobytes()] for row in scale])[order, :, None].astype(np.float16)
    given = opset13.parameter([ROWS, GROUPS, 32], np.float16)  # q as an input: nothing is folded away
    shifted = opset13.subtract(given, opset13.constant(rounded))
    other = opset13.multiply(given, opset13.constant(np.float16(2)))
    model = openvino.Model([opset13.multiply(shifted, opset13.constant(scale[order, :, None])), other], [given])

    def answer():
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return list(compiled(q[order].astype(np.float16)).values())

    before, _ = answer()
    put_zeros_right(model, row_zeros(gguf))
    after, twice = answer()
    assert np.abs(before - exact).max() > 0.1 * scale.max()
    assert np.abs(after - exact).max() < 0.01 * scale.max()
    np.testing.assert_array_equal(twice, 2 * q[order])
