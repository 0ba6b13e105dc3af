"""The gated GEMM for Hopper against the reference, on such a GPU alone, for Gluon has no interpreter; and when it is chosen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from pagegraph.kernels.gpu import multiprocessors
from pagegraph.kernels.linear import cuda, reference
from pagegraph.kernels.linear.gated_gemm_hopper import gated_gemm, takes
from pagegraph.kernels.linear.tiles import last_round_of

BF16 = torch.bfloat16


def operands(rows: int, size: int, inner: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, weight, the gated product in float32, rounded where the kernel rounds)."""
    x = torch.randn(rows, inner + 24, device="cuda", dtype=dtype)[:, :inner]  # rows that are no neighbours
    weight = torch.randn(2 * size, inner, device="cuda", dtype=dtype) * inner**-0.5
    return x, weight, reference.silu_mul(functional.linear(x.float(), weight.float()).to(dtype)).float()


def hopper() -> int:
    programs = multiprocessors(torch.device("cuda", 0)) if torch.cuda.is_available() else 0
    if not programs:
        pytest.skip("no Hopper GPU")
    return programs


@pytest.mark.gpu
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "size", "inner"),
    [
        (65, 4096, 512),
        (129, 14336, 4096),
        (256, 14336, 4096),
        (300, 8, 64),  # less than a tile
        (1000, 1544, 72),  # columns of x beyond the last step
        (2049, 9728, 2560),
        (4100, 1000, 1024),  # more rows of tiles than are walked together
    ],
)
def test_equals_reference(rows: int, size: int, inner: int, dtype: torch.dtype, narrow: bool) -> None:
    programs = hopper()
    x, weight, expected = operands(rows, size, inner, dtype)
    assert takes(x, weight)
    poison = torch.full((rows, size), float("nan"), device="cuda", dtype=dtype)
    del poison  # its memory is the next result's
    out = gated_gemm(x, weight, programs, narrow=narrow)
    assert out.dtype == dtype and out.shape == expected.shape
    error = ((out.float() - expected).norm() / expected.norm()).item()
    assert error < 5e-3
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    assert torch.equal(out, gated_gemm(x, weight, programs, narrow=narrow))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [128, 256, 1024, 2000])
def test_a_replayed_graph_reads_new_rows(rows: int) -> None:
    """By the op's own choice of kernels."""
    hopper()
    x, weight, _ = operands(rows, 14336, 4096, BF16)
    cuda.linear(x, weight, None, gated=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.linear(x, weight, None, gated=True)
    for _ in range(2):
        x.normal_()
        out.fill_(float("nan"))
        graph.replay()
        expected = reference.silu_mul(functional.linear(x.float(), weight.float()).to(BF16)).float()
        assert ((out.float() - expected).norm() / expected.norm()).item() < 5e-3


def test_what_it_takes() -> None:
    def x(*shape: int, stride: int = 512, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.empty_strided(shape, (stride, 1), dtype=dtype, device="meta")

    def weight(rows: int = 64, size: int = 512, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.empty(rows, size, dtype=dtype, device="meta")

    assert takes(x(300, 512), weight()) and takes(x(300, 512, stride=520), weight())
    assert takes(x(300, 512, dtype=torch.float16), weight(dtype=torch.float16))
    assert not takes(x(300, 512, dtype=torch.float32), weight(dtype=torch.float32))
    assert not takes(x(300, 512), weight(dtype=torch.float16))
    assert not takes(x(300, 512, stride=516), weight()) and not takes(x(300, 508), weight(size=508))
    assert not takes(x(300, 512), weight(72)) and not takes(x(300, 512), weight(64, 1024)[:, :512])


def test_where_it_is_chosen() -> None:
    """A measured shape by its table, others where rounds of tiles are full."""

    def chosen(rows: int, out_size: int = 28672, size: int = 4096) -> str | None:
        return last_round_of(rows, out_size, size, 132)

    assert [chosen(rows) for rows in (96, 97, 128, 216, 217, 300, 448, 512)] == [
        None, "whole", "whole", None, "narrow", None, "narrow", None,
    ]  # fmt: skip
    assert chosen(1280) == "narrow" and chosen(1536) is None
    assert chosen(8192) == chosen(16384) == "whole"  # beyond the table
    assert chosen(384, 24576) is None and chosen(448, 24576) == chosen(1024, 24576) == "whole"
    assert chosen(1024, 33 * 256, 4096) == "whole" and chosen(1024, 34 * 256, 4096) is None


@given(st.integers(1, 20000), st.integers(1, 500).map(lambda n: 16 * n), st.integers(1, 2000).map(lambda n: 8 * n))
def test_few_rows_are_never_its(rows: int, out_size: int, size: int) -> None:
    if rows <= 64 or size < 1024:
        assert last_round_of(rows, out_size, size, 132) is None
