"""Steps over recurrent state for every op: several sequences that begin, go on or rest, with padding that is NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Rows of each sequence and tokens that it had before; past both chunk sizes, single tokens, a padding sequence.
STEPS = {
    "prompts": ([70, 1, 17, 129, 3], [0, 0, 5, 64, 0]),
    "short prompts": ([9, 1, 4, 0, 13], [0, 3, 5, 0, 1]),
    "decodes": ([1, 1, 1, 1, 1], [9, 0, 3, 1, 7]),
    "mixed": ([1, 16, 1, 0, 33], [4, 16, 0, 0, 1]),
    "chunks": ([70, 1, 9, 0, 8], [5, 7, 0, 0, 1]),
}
SLOTS = [4, 0, 6, 2, 5]
PADDING = 3  # rows


@dataclass
class Step:
    """Whose rows are which."""

    slots: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    rows: int  # with padding

    @staticmethod
    def of(name: str) -> Step:
        counts, before = (torch.tensor(one, dtype=torch.int32) for one in STEPS[name])
        start = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()])
        return Step(
            torch.tensor(SLOTS, dtype=torch.int32), start, torch.where(counts > 0, before + counts, 0).int(),
            int(start[-1]) + PADDING,
        )  # fmt: skip


def conv(step: Step, dtype: torch.dtype, bias: bool, width: int) -> tuple[list, torch.Tensor]:
    """Arguments before and behind the states, and states, of a convolution."""
    x = rows(step, 40, dtype=dtype)
    weight = torch.randn(40, width).to(dtype)
    return [x, weight, torch.randn(40).to(dtype) if bias else None], states(width - 1, 40, dtype=dtype)


def delta(step: Step, dtype: torch.dtype, vector: bool) -> tuple[list, torch.Tensor]:
    heads, size, value = 2, 16, 24
    shape = (heads, size) if vector else (heads,)
    decay = -torch.nn.functional.softplus(rows(step, *shape) * 2)
    given = [rows(step, heads, size, dtype=dtype), rows(step, heads, size, dtype=dtype)]
    given += [rows(step, heads, value, dtype=dtype), decay, rows(step, heads, dtype=dtype).sigmoid()]
    return given, states(heads, size, value)


def scan(step: Step, dtype: torch.dtype, mamba1: bool) -> tuple[list, torch.Tensor]:
    heads, size, groups, state = (10, 1, 1, 4) if mamba1 else (6, 8, 2, 16)
    x, dt = rows(step, heads, size, dtype=dtype), torch.nn.functional.softplus(rows(step, heads))
    A = -torch.rand(heads, state).exp() if mamba1 else -torch.rand(heads).exp()
    B, C = rows(step, groups, state, dtype=dtype), rows(step, groups, state, dtype=dtype)
    return [x, dt, A, B, C], states(heads, size, state)


def rows(step: Step, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A strided part of what a product gives, NaN in padding."""
    wide = torch.randn(step.rows, 2, *shape).to(dtype)
    wide[step.rows - PADDING :] = torch.nan
    return wide[:, 1]


def states(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of seven slots; NaN where none of the step's sequences goes on from."""
    return torch.randn(7, *shape).to(dtype)


def poisoned(pool: torch.Tensor, step: Step) -> torch.Tensor:
    """The states, NaN but where a sequence of the step goes on."""
    goes_on = step.seq_lens > step.query_start.diff()
    out = torch.full_like(pool, torch.nan)
    out[step.slots[goes_on].long()] = pool[step.slots[goes_on].long()]
    return out


def compare(
    op: Callable[..., torch.Tensor],
    oracle: Callable[..., torch.Tensor],
    given: list,
    pool: torch.Tensor,
    step: Step,
    *more: bool,
    atol: float,
) -> None:
    """Both on the same, results and states; slots of sequences without rows are not touched, and padding shows nowhere."""
    pool = poisoned(pool, step)
    mine, expected = pool.clone(), pool.clone()
    out = op(*given, mine, step.slots, step.query_start, step.seq_lens, *more)
    wanted = oracle(*given, expected, step.slots, step.query_start, step.seq_lens, *more)
    live = step.rows - PADDING
    torch.testing.assert_close(out[:live], wanted[:live], atol=atol, rtol=atol)
    torch.testing.assert_close(mine, expected, atol=atol, rtol=atol, equal_nan=True)
    with_rows = step.slots[step.query_start.diff() > 0].long()
    assert not mine[with_rows].isnan().any()
