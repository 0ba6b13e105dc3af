"""Steps over recurrent state for every op: several sequences that begin, go on or rest, with padding that is NaN."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pagegraph.kernels.state import reference

# Rows of each sequence and tokens that it had before; past both chunk sizes, single tokens, a padding sequence.
STEPS = {
    "prompts": ([70, 1, 17, 129, 3], [0, 0, 5, 64, 0]),
    "short prompts": ([9, 1, 4, 0, 13], [0, 3, 5, 0, 1]),
    "decodes": ([1, 1, 1, 1, 1], [9, 0, 3, 1, 7]),
    "mixed": ([1, 16, 1, 0, 33], [4, 16, 0, 0, 1]),
    "chunks": ([70, 1, 9, 0, 8], [5, 7, 0, 0, 1]),
}
SLOTS = [4, 0, 6, 2, 5]
Drafted = dict[int, tuple[int, int, int]]
# Steps one after the other: of each slot its tokens, how many of them are draft tokens, and how many of these are then accepted.
DRAFTED: list[Drafted] = [
    {4: (5, 0, 0), 0: (1, 0, 0), 6: (3, 0, 0)},
    {4: (4, 3, 2), 0: (3, 2, 0), 6: (1, 0, 0)},
    {4: (1, 0, 0), 0: (4, 3, 3), 6: (3, 2, 1), 2: (20, 0, 0)},
    {4: (2, 1, 1), 0: (4, 3, 1), 6: (4, 3, 3), 2: (4, 3, 2)},
    {4: (1, 0, 0), 0: (1, 0, 0), 6: (9, 0, 0), 2: (3, 2, 0)},
    {4: (6, 0, 0), 0: (2, 1, 1), 6: (1, 0, 0), 2: (1, 0, 0)},
]
BEGIN_ANEW = {(5, 4)}  # (step, slot) of those that begin in a slot that another has left
MOST_DRAFTS = 3
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
        return Step.made(SLOTS, *STEPS[name])

    @staticmethod
    def made(slots: list[int], counts: list[int], before: list[int]) -> Step:
        rows, had = (torch.tensor(one, dtype=torch.int32) for one in (counts, before))
        start = torch.cat([torch.zeros(1, dtype=torch.int32), rows.cumsum(0).int()])
        return Step(
            torch.tensor(slots, dtype=torch.int32), start, torch.where(rows > 0, had + rows, 0).int(),
            int(start[-1]) + PADDING,
        )  # fmt: skip


def conv(step: Step, dtype: torch.dtype, bias: bool, width: int) -> tuple[list, torch.Tensor]:
    """Arguments before and behind the states, and states, of a convolution."""
    x = rows(step, 40, dtype=dtype)
    weight = torch.randn(40, width).to(dtype)
    return [x, weight, torch.randn(40).to(dtype) if bias else None], states(width - 1, 40, dtype=dtype)


def delta(step: Step, dtype: torch.dtype, vector: bool, size: int = 16, share: int = 1) -> tuple[list, torch.Tensor]:
    """size: of keys; share: heads of values to one of keys."""
    heads, value = 2 * share, 24
    shape = (heads, size) if vector else (heads,)
    decay = -torch.nn.functional.softplus(rows(step, *shape) * 2)
    given = [rows(step, 2, size, dtype=dtype), rows(step, 2, size, dtype=dtype)]
    given += [rows(step, heads, value, dtype=dtype), decay, rows(step, heads, dtype=dtype).sigmoid()]
    return given, states(heads, size, value)


def projected_delta(step: Step, dtype: torch.dtype, size: int = 16) -> tuple[list, torch.Tensor]:
    """As `delta` with shared keys, decay and beta as projected: parts of one product, some of them beyond where softplus bends."""
    given, pool = delta(step, dtype, False, size, share=2)
    return [*given[:3], rows(step, 4, dtype=dtype) * 12, rows(step, 4, dtype=dtype)], pool


def with_gates(op: Callable[..., torch.Tensor], dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """The delta rule of decay and beta as projected."""
    A_log, dt_bias = torch.tensor([-8.0, -2.0, 0.5, 1.0]).to(dtype), torch.tensor([-1.0, 0.0, 0.5, 3.0]).to(dtype)
    most = 12  # arguments ahead of these

    def call(*given: object) -> torch.Tensor:
        return op(*given, *[None] * (most - len(given)), A_log, dt_bias)

    return call


def scan(step: Step, dtype: torch.dtype, mamba1: bool) -> tuple[list, torch.Tensor]:
    heads, size, groups, state = (10, 1, 1, 4) if mamba1 else (6, 8, 2, 16)
    x, dt = rows(step, heads, size, dtype=dtype), rows(step, heads, dtype=dtype)
    A = -torch.rand(heads, state).exp() if mamba1 else torch.rand(heads)
    B, C = rows(step, groups, state, dtype=dtype), rows(step, groups, state, dtype=dtype)
    limits = (None, None) if mamba1 else (0.1, 2.0)
    given = [x, dt, A, B, C, torch.randn(heads).to(dtype), torch.randn(heads).to(dtype), True, *limits, not mamba1]
    return given, states(heads, size, state)


def scan_of_a_layer(dtype: torch.dtype, mamba1: bool) -> Callable[[Step], tuple[list, torch.Tensor]]:
    """`scan` of steps of one layer, whose parameters are the same in all."""
    layer = scan(Step.of("decodes"), dtype, mamba1)[0]

    def case(step: Step) -> tuple[list, torch.Tensor]:
        given, pool = scan(step, dtype, mamba1)
        return [one if at in (0, 1, 3, 4) else layer[at] for at, one in enumerate(given)], pool

    return case


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


def compare_drafted(
    op: Callable[..., torch.Tensor],
    oracle: Callable[..., torch.Tensor],
    case: Callable[[Step], tuple[list, torch.Tensor]],
    taken: list[int],
    *more: bool,
    atol: float,
    steps: list[Drafted] = DRAFTED,
    most: int = MOST_DRAFTS,
    wide: int | None = None,
) -> None:
    """Steps with draft tokens against each slot's accepted tokens in steps of their own, which have none; then against the oracle's own
    of the same steps, rejected draft tokens, what is put aside and states that are still without accepted ones too.

    taken: of what `case` gives, the inputs that a recurrence takes up; wide: numbers that are put aside of a token, if others than
    these. most: draft tokens that there is room for.
    """
    first, pool = case(Step.of("decodes"))
    wide = wide or sum(first[at][0].numel() for at in taken)
    dummy = len(pool)
    pool = torch.cat([pool, pool[:1]])
    drafts = torch.full((dummy, 2 * most + 1, wide), torch.nan, dtype=pool.dtype)
    mine, expected = torch.full_like(pool, torch.nan), torch.full_like(pool, torch.nan)
    theirs, their_drafts = mine.clone(), drafts.clone()
    lens = torch.zeros(len(pool), dtype=torch.int32)
    had = dict.fromkeys(SLOTS, 0)
    for number, tokens in enumerate(steps):
        slots, counts, before, kept = [], [], [], []
        for slot, (count, drafted, accepted) in tokens.items():
            had[slot] = 0 if (number, slot) in BEGIN_ANEW else had[slot]
            own = count - drafted
            slots += [slot] * (1 + drafted)
            counts += [own] + [1] * drafted
            before += [had[slot]] + [had[slot] + own + at for at in range(drafted)]
            kept += [True] * own + [at < accepted for at in range(drafted)]
            had[slot] += own + accepted
        live = len(kept)
        # Dummy queries, which no slot has draft tokens of, then padding: a step of decodes has as many rows as sequences.
        busy = 2 * most if number % 2 else 0
        pad = [dummy] * PADDING
        step = Step.made([*slots, 5, *[dummy] * busy, *pad], [*counts, 0, *[1] * busy, *[0] * len(pad)],
                         [*before, 0, *range(busy), *[0] * len(pad)])  # fmt: skip
        given, _ = case(step)
        metadata = step.slots, step.query_start, step.seq_lens
        out = op(*given, mine, *metadata, *more, drafts, lens)
        same = oracle(*given, theirs, *metadata, *more, their_drafts, lens)
        torch.testing.assert_close(out[:live], same[:live], atol=atol, rtol=atol)
        torch.testing.assert_close(mine[:dummy], theirs[:dummy], atol=atol, rtol=atol, equal_nan=True)
        # As they were given, but for a softplus that may be among them.
        torch.testing.assert_close(drafts, their_drafts, atol=0, rtol=4e-6, equal_nan=True)
        reference.count_states(lens, *metadata)
        alone = Step.made(
            list(tokens), [count - drafted + accepted for count, drafted, accepted in tokens.values()],
            [had[slot] - (count - drafted + accepted) for slot, (count, drafted, accepted) in tokens.items()],
        )  # fmt: skip
        rows = torch.tensor(kept).nonzero()[:, 0]
        fewer = [one if one is weight else one[rows] for one, weight in zip(given, first)]  # as each step has it
        wanted = oracle(*fewer, expected, alone.slots, alone.query_start, alone.seq_lens, *more)
        torch.testing.assert_close(out[rows], wanted, atol=atol, rtol=atol)
        for slot, (count, drafted, _) in tokens.items():
            assert lens[slot] == before[slots.index(slot)] + count - drafted
    settled = [slot for slot, (_, _, accepted) in steps[-1].items() if not accepted]
    assert settled
    torch.testing.assert_close(mine[settled], expected[settled], atol=atol, rtol=atol)
    assert mine[5].isnan().all() and drafts[5].isnan().all()


def drafted_steps(most: int) -> list[Drafted]:
    """Steps as `DRAFTED` is, of as many draft tokens as there is room for and fewer, in every slot but 5."""
    numbers = random.Random(most)
    steps: list[Drafted] = [{4: (3, 0, 0), 0: (1, 0, 0), 6: (2, 0, 0), 2: (17, 0, 0)}]
    for _ in range(4):
        step = {}
        for slot in numbers.sample([4, 0, 6, 2], 3):
            drafted = numbers.choice([0, most, numbers.randint(1, most)])
            step[slot] = (1 + drafted, drafted, numbers.choice([0, drafted, numbers.randint(0, drafted)]))
        steps.append(step)
    return [*steps, {slot: (1, 0, 0) for slot in (2, 4, 6)}]
