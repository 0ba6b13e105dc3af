"""The planes of every kept GGUF type give the values of the gguf package's own dequantiser."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from compiler.gguf_planes import BLOCKS, planes

ROWS, BLOCKS_A_ROW = 6, 3


def random_bytes(kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Every bit of codes and small scales at random; the half-precision scales of a block finite."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (ROWS * BLOCKS_A_ROW, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for at in {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}.get(kind.name, (0,)):
        half = generator.normal(size=len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = half[:, None].view(np.uint8)
    return blocks.reshape(ROWS, -1)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_planes_give_the_packages_values(kind: gguf.GGMLQuantizationType) -> None:
    data = random_bytes(kind)
    expected = gguf.dequantize(data, kind)
    codes, scale, shift = planes(data, kind)
    group = codes.shape[1] // scale.shape[1]
    assert np.array_equal(codes, codes.round()) and -128 <= codes.min() and codes.max() <= 127
    got = codes * scale.repeat(group, axis=1)
    if shift is None:
        assert np.array_equal(got, expected)
    else:
        # The shift moved to the middle of the codes costs roundings of float32.
        largest = np.abs(expected).max()
        assert np.abs(got + shift.repeat(group, axis=1) - expected).max() <= 4 * np.finfo(np.float32).eps * largest
