"""The GEMM that gives a row the same bits however many rows there are: against PyTorch's, and against itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

MODULE = "pagegraph.kernels.linear.fixed_gemm"
SMALL = {f"{MODULE}.LEAST_COLUMNS": 64}  # so that a short product is in parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("out_size", "size", "biased"), [(96, 64, False), (150, 200, True), (40, 300, False)])
def test_rows_are_the_same_alone(triton_calls, dtype: torch.dtype, out_size: int, size: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(140, size + 16, generator=generator).to(dtype)[:, :size]  # rows that are no neighbours
    weight = torch.randn(out_size, size, generator=generator).to(dtype)
    bias = torch.randn(out_size, generator=generator).to(dtype) if biased else None
    whole, _ = triton_calls.call(MODULE, "fixed_linear", x, weight, bias, constants=SMALL)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    expected = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    torch.testing.assert_close(whole.float(), expected, atol=tolerance * size**0.5, rtol=tolerance)
    for rows in (slice(0, 1), slice(5, 8), slice(70, 134), slice(0, 65)):
        for _ in range(2):  # the second call finds the arrival counts as the first left them
            part, _ = triton_calls.call(MODULE, "fixed_linear", x[rows], weight, bias, constants=SMALL)
            assert torch.equal(part, whole[rows])
