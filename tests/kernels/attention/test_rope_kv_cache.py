"""Norm, rotation and KV write in one kernel against the plain formulas."""

from __future__ import annotations

import pytest
import torch

from pagegraph.kernels.attention import reference


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 64), (9, 3, 80), (16, 2, 128), (3, 3, 24)])
@pytest.mark.parametrize("normed", [False, True])
def test_equals_reference(triton_calls, heads: int, kv_heads: int, size: int, normed: bool) -> None:
    tokens, block_size, num_blocks, value_size = 5, 16, 4, size - 8
    merged = torch.randn(tokens, (heads + kv_heads) * size + kv_heads * value_size)
    query, key, value = merged.split([heads * size, kv_heads * size, kv_heads * value_size], dim=1)
    query, key, value = (
        query.unflatten(1, (heads, -1)),
        key.unflatten(1, (kv_heads, -1)),
        value.unflatten(1, (kv_heads, -1)),
    )
    cos, sin = torch.randn(2, tokens, size)  # the halves differ, unlike those of real angles
    norms = [1 + 0.1 * torch.randn(size) for _ in range(2)] if normed else [None, None]
    caches = [torch.full((num_blocks, block_size, kv_heads, n), torch.nan) for n in (size, value_size)]
    slot_mapping = torch.tensor([17, 18, 40, 63, 0], dtype=torch.int32)
    expected = [cache.clone() for cache in caches]
    rotated = [reference.norm_and_rotate(x, cos, sin, norm, 1e-6) for x, norm in zip((query, key), norms)]
    reference.write_kv(rotated[1], value, *expected, slot_mapping)
    out, arguments = triton_calls.call(
        "pagegraph.kernels.attention.rope_kv_cache",
        "rope_write",
        query,
        key,
        value,
        cos,
        sin,
        *norms,
        1e-6,
        *caches,
        slot_mapping,
    )
    torch.testing.assert_close(out, rotated[0], atol=2e-5, rtol=1e-5)
    for mine, theirs in zip(arguments[8:10], expected):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5, equal_nan=True)


def test_an_8_bit_kv_cache(triton_calls) -> None:
    """Codes may differ by one step where a rotation's rounding decides; what is too large is cut off."""
    tokens, heads, size = 4, 2, 32
    query, key, value = torch.randn(3, tokens, heads, size)
    value[0] *= 1e4
    cos, sin = torch.randn(2, tokens, size)
    caches = [torch.zeros(3, 16, heads, size).to(torch.float8_e4m3fn) for _ in range(2)]
    slot_mapping = torch.tensor([17, 18, 40, 21], dtype=torch.int32)
    expected = [cache.clone() for cache in caches]
    reference.write_kv(reference.norm_and_rotate(key, cos, sin, None, 0.0), value, *expected, slot_mapping)
    _, arguments = triton_calls.call(
        "pagegraph.kernels.attention.rope_kv_cache",
        "rope_write",
        query,
        key,
        value,
        cos,
        sin,
        None,
        None,
        0.0,
        *caches,
        slot_mapping,
    )
    torch.testing.assert_close(arguments[8].float(), expected[0].float(), rtol=2**-3, atol=2**-9)
    assert torch.equal(arguments[9].float(), expected[1].float())
    assert arguments[9].float().abs().max() == 448


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_transformers(dtype: torch.dtype) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    heads = torch.randn(6, 4, 32, dtype=dtype)
    angle = torch.randn(6, 16).repeat(1, 2)
    norm = Qwen3RMSNorm(32).to(dtype)
    norm.weight.data.normal_()
    normed = norm(heads)[None].transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(normed, normed, angle.cos().to(dtype)[None], angle.sin().to(dtype)[None])
    got = reference.norm_and_rotate(heads, angle.cos().to(dtype), angle.sin().to(dtype), norm.weight, 1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(got, expected[0].transpose(0, 1), atol=tolerance, rtol=tolerance)
