"""A rank of `test_one_shot`: sums tensors over memory that processes share, by Triton's interpreter.

Arguments: rank, ranks, a folder with the ranks' memory as files, and `stopped` for a rank that waits for nobody. Writes its sums to the
folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

CALLS = (
    (1, torch.float32),
    (1, torch.bfloat16),
    (5000, torch.bfloat16),
    (70_000, torch.float16),
    (250_000, torch.float32),
)


def given(rank: int, call: int) -> torch.Tensor:
    """What a rank brings to a call."""
    count, dtype = CALLS[call]
    return torch.randn(count, generator=torch.Generator().manual_seed(100 * call + rank)).to(dtype)


def memory(ranks: int) -> int:
    """Bytes of a rank's."""
    from pagegraph.kernels.collective.one_shot import bytes_of  # imports Triton

    return bytes_of(ranks)


def main(rank: int, ranks: int, folder: Path, stopped: bool) -> None:
    from pagegraph.kernels.collective.one_shot import OneShot

    memories = [
        torch.from_file(str(folder / f"memory-{one}"), shared=True, size=memory(ranks), dtype=torch.uint8)
        for one in range(ranks)
    ]
    sums = OneShot(rank, [one.data_ptr() for one in memories], torch.device("cpu"))
    if stopped:
        sums.stop()
    found = [sums.all_reduce(given(rank, call)) for call in range(len(CALLS))]
    torch.save(found, folder / f"sums-{rank}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:] == ["stopped"])
