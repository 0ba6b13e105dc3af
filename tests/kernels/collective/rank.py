"""The ranks of `test_one_shot`, each a process: sum tensors over memory that they share, by Triton's interpreter.

Arguments: ranks, a folder with their memory as files, and `stopped` for a first rank alone that waits for nobody. Each writes its sums
to the folder. They are forks of one process, which has imported what all of them need.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from tests.kernels.interpreter_process import keep_types, spare_repeated_work

CALLS = (
    (1, torch.float32),
    (1, torch.bfloat16),
    (5000, torch.bfloat16),
    (70_000, torch.float16),
    (140_000, torch.float32),
)


def given(rank: int, call: int) -> torch.Tensor:
    """What a rank brings to a call."""
    count, dtype = CALLS[call]
    return torch.randn(count, generator=torch.Generator().manual_seed(100 * call + rank)).to(dtype)


def memory(ranks: int) -> int:
    """Bytes of a rank's."""
    from pagegraph.kernels.collective.one_shot import bytes_of  # imports Triton

    return bytes_of(ranks)


def add_up(rank: int, ranks: int, folder: Path, stopped: bool) -> None:
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


def main(ranks: int, folder: Path, stopped: bool) -> None:
    for rank in range(ranks):
        (folder / f"memory-{rank}").write_bytes(bytes(memory(ranks)))
    spare_repeated_work()
    keep_types()
    started = []
    for rank in range(1 if stopped else ranks):
        started.append(os.fork())
        if not started[-1]:
            add_up(rank, ranks, folder, stopped)
            os._exit(0)
    sys.exit(any([os.waitpid(one, 0)[1] for one in started]))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] == ["stopped"])
