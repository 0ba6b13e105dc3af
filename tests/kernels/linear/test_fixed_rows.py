"""Products on a CPU whose rows come out the same however many they are: in fact, and where PyTorch's would not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.kernels.linear import fixed_rows

SHAPES = [(96, 64), (33, 24), (128, 1536)]


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fixed_rows, "_orders", {})
    yield


@settings(max_examples=60)
@given(st.sampled_from(SHAPES), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 600), st.booleans())
def test_a_row_is_the_same_alone(shape: tuple[int, int], dtype: torch.dtype, count: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    x, weight = (torch.randn(size, shape[1], generator=generator).to(dtype) for size in (count, shape[0]))
    bias = torch.randn(shape[0], generator=generator).to(dtype) if biased else None
    out = torch.ops.pagegraph.fixed_linear(x[None], weight, bias)[0]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight, bias), atol=tolerance, rtol=tolerance)
    for row in {0, count // 2, count - 1}:
        assert torch.equal(torch.ops.pagegraph.fixed_linear(x[row : row + 1], weight, bias)[0], out[row])


def summed(rows: torch.Tensor, parts: int) -> torch.Tensor:
    """A product of one column, its terms added up in so many parts."""
    return torch.stack([torch.stack([one.sum() for one in row.chunk(parts)]).sum() for row in rows])[:, None]


def test_rows_go_in_blocks_where_more_of_them_are_added_up_otherwise() -> None:
    asked = []

    def product(rows: torch.Tensor) -> torch.Tensor:
        asked.append(len(rows))
        return summed(rows, 3 if len(rows) in (4, 48) else 7)

    x = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    out = fixed_rows.product_of(x, product, "blocks")
    assert torch.equal(out, summed(x, 7))  # the order of 256 rows, which 16 keep and 4 do not
    assert asked[-3:] == [16, 16, 16]  # 40 would be padded to 48, which do not


def test_products_in_which_a_row_depends_on_its_place_are_refused() -> None:
    def product(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([summed(row[None], 1 + at) for at, row in enumerate(rows)])

    with pytest.raises(RuntimeError, match="deterministic=true: on this CPU .* depends on its place"):
        fixed_rows.product_of(torch.randn(5, 200), product, "places")
