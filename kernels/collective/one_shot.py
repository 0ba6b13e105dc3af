"""Triton: the sum of a few rows over the ranks of a host in one kernel, which needs one way through the link.

Each program has a part of x. It writes that part into the memory of every other rank, then a count behind it, waits until the
others' counts stand in its own, and adds up in the order of ranks: the same bits on all of them. Parts of a call and of the next lie
in two halves in turn: a rank that is at the next call but one knows that all others have read this one's. NCCL's kernels do more
for a sum than its few bytes need, and need no peer access.

Who waits for a rank that has ended waits until `OneShot.stop`. Knows addresses; does not know processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait

MAX_SENT = 4 << 20  # bytes of x times ranks, of which all but one are written to; more goes to NCCL
PROGRAMS = 64
LEAST = 1024  # elements of a program
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def slot_bytes(ranks: int) -> int:
    """Of a program's part at most: a power of two."""
    return 1 << (MAX_SENT // (ranks * PROGRAMS)).bit_length() - 1


def bytes_of(ranks: int) -> int:
    """Memory of each rank: counts int64 [PROGRAMS, ranks], then parts [2, PROGRAMS, ranks, slot_bytes]."""
    return PROGRAMS * ranks * (8 + 2 * slot_bytes(ranks))


@triton.jit
def one_shot_kernel(
    out_ptr,
    x_ptr,
    memories_ptr,  # addresses by rank
    counts_ptr,  # calls of each program
    stop_ptr,
    numel,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PART: tl.constexpr,
    SLOT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    flags: tl.constexpr = PROGRAMS * RANKS * 64 // dtype.primitive_bitwidth  # elements that the counts take
    if PDL:
        wait()
    count = tl.load(counts_ptr + program) + 1
    slot = ((count % 2) * PROGRAMS + program) * RANKS
    for begin in range(0, PART, BLOCK):
        at = program * PART + begin + lane
        x = tl.load(x_ptr + at, mask=at < numel, other=0.0)
        for other in tl.static_range(RANKS):
            if other != RANK:
                parts = tl.load(memories_ptr + other).to(tl.pointer_type(dtype)) + flags
                tl.store(parts + (slot + RANK) * SLOT + begin + lane, x, mask=at < numel)
    tl.debug_barrier()
    for other in tl.static_range(RANKS):
        if other != RANK:
            theirs = tl.load(memories_ptr + other).to(tl.pointer_type(tl.int64))
            tl.atomic_xchg(theirs + program * RANKS + RANK, count, sem="release", scope="sys")
    ours = tl.load(memories_ptr + RANK).to(tl.pointer_type(tl.int64)) + program * RANKS
    none = count - count
    for other in tl.static_range(RANKS):
        if other != RANK:
            seen = tl.atomic_add(ours + other, none, sem="acquire", scope="sys")
            while seen < count:
                seen = tl.atomic_add(ours + other, none, sem="acquire", scope="sys")
                if tl.load(stop_ptr, volatile=True) != 0:
                    seen = count
    tl.debug_barrier()
    parts = tl.load(memories_ptr + RANK).to(tl.pointer_type(dtype)) + flags
    for begin in range(0, PART, BLOCK):
        at = program * PART + begin + lane
        total = tl.zeros([BLOCK], tl.float32)
        for other in tl.static_range(RANKS):
            if other == RANK:
                part = tl.load(x_ptr + at, mask=at < numel, other=0.0)
            else:
                source = parts + (slot + other) * SLOT + begin + lane
                part = tl.load(source, mask=at < numel, other=0.0, cache_modifier=".cg")
            total += part.to(tl.float32)
        tl.store(out_ptr + at, total.to(dtype), mask=at < numel)
    tl.store(counts_ptr + program, count)


def one_shot(x: Tensor, rank: int, memories: Tensor, counts: Tensor, stop: Tensor) -> Tensor:
    """The sum of every rank's x, which is contiguous, as a tensor of its own."""
    out = torch.empty_like(x)
    part = max(LEAST, triton.next_power_of_2(-(-x.numel() // PROGRAMS)))
    one_shot_kernel[(-(-x.numel() // part),)](
        out,
        x,
        memories,
        counts,
        stop,
        x.numel(),
        RANK=rank,
        RANKS=len(memories),
        PART=part,
        SLOT=slot_bytes(len(memories)) // x.element_size(),
        PROGRAMS=PROGRAMS,
        BLOCK=LEAST,
        num_warps=4,
        **dependent(x.device),
    )
    return out


class OneShot:
    """One rank's end of such sums, all of which are on one stream."""

    def __init__(self, rank: int, addresses: Sequence[int], device: torch.device) -> None:
        """addresses: by rank, of `bytes_of` bytes each, zeros at first."""
        self._rank = rank
        self._memories = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._counts = torch.zeros(PROGRAMS, dtype=torch.int64, device=device)
        self._stop = torch.zeros(1, dtype=torch.int32, device=device)
        # What `stop` needs is there before a kernel waits: to allocate it might wait for that kernel.
        on_device = device.type == "cuda"
        self._one = torch.ones(1, dtype=torch.int32, pin_memory=on_device)
        self._beside = torch.cuda.Stream(device) if on_device else None

    def takes(self, x: Tensor) -> bool:
        """Whether `all_reduce` sums x."""
        return 0 < x.nbytes <= PROGRAMS * slot_bytes(len(self._memories)) and x.dtype in DTYPES

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, which is contiguous, as a tensor of its own."""
        return one_shot(x, self._rank, self._memories, self._counts, self._stop)

    def stop(self) -> None:
        """Let calls that wait go on, whose sums are then wrong; any thread may call. A copy, for which no multiprocessor has to be free."""
        with torch.cuda.stream(self._beside):
            self._stop.copy_(self._one, non_blocking=True)
