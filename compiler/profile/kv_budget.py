"""How many blocks the KV cache holds, and the refusals where that is too few, or slots of recurrent state too large.

On the CPU the amount is a setting; on CUDA it is what a measured peak leaves free. Knows no scheduling.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

log = logging.getLogger("pagegraph.memory")

MIB = 1 << 20
GIB = 1 << 30
CONTEXT = GIB  # what a process of CUDA's holds without having allocated anything


class DoesNotFit(ValueError):
    """The configuration needs more memory than there is; the message holds the arithmetic and a value that fits."""


@dataclass(frozen=True, slots=True)
class KvBudget:
    """Blocks of the pool (block 0 is the null block) and the bytes they take."""

    num_blocks: int
    block_bytes: int


def plan_blocks(
    available_bytes: int, block_bytes: int, block_size: int, max_model_len: int, max_num_seqs: int, source: str
) -> KvBudget:
    """Blocks that fit in `available_bytes`; raises DoesNotFit if one sequence of `max_model_len` would not.

    Where no layer attends, blocks hold nothing and only count tokens: as many as all sequences can want.
    """
    needed = -(-max_model_len // block_size) + 1
    if not block_bytes:
        return KvBudget(1 + max_num_seqs * (needed - 1), 0)
    num_blocks = available_bytes // block_bytes
    if num_blocks < needed:
        fits = (num_blocks - 1) * block_size
        shorter = f"Set max_model_len to at most {fits}, or give" if fits > 0 else "Give"
        raise DoesNotFit(
            f"max_model_len {max_model_len} needs {needed} blocks of {block_size} tokens "
            f"({needed * block_bytes / GIB:.2f} GiB), but {source} leaves {available_bytes / GIB:.2f} GiB = "
            f"{num_blocks} blocks. {shorter} the KV cache {_mebibytes(needed * block_bytes)} or more"
            f"{'' if fits > 0 else f'; {_mebibytes(2 * block_bytes)} is the least, for max_model_len {block_size}'}."
        )
    return KvBudget(num_blocks, block_bytes)


def check_slots(available_bytes: int, slot_bytes: int, slots: int, source: str) -> str:
    """`source`, saying what slots of recurrent state take of it.

    Raises DoesNotFit if they are more than `available_bytes`.
    """
    if not slot_bytes:
        return source
    said = f"{slots} slots of recurrent state ({slots * slot_bytes / GIB:.2f} GiB)"
    if slots * slot_bytes > available_bytes:
        fewer = slots - available_bytes // slot_bytes
        raise DoesNotFit(
            f"max_num_seqs and state_cache_memory ask for {said}, {slot_bytes / MIB:.1f} MiB each, but {source} leaves"
            f" {max(available_bytes, 0) / GIB:.2f} GiB. Lower max_num_seqs by {fewer} or more, or state_cache_memory by"
            f" {_mebibytes(fewer * slot_bytes)} or more."
        )
    return f"{source}, less {said},"


def _mebibytes(size: int) -> str:
    """In the notation of the configuration, rounded up."""
    return f"{-(-size // MIB)}MiB"


def left_for_blocks(total: int, used: int, gpu_memory_utilization: float, step_bytes: int, graph_bytes: int) -> int:
    """Bytes of a device of `total` that are left of our share; below 0 where there is less than nothing."""
    return int(total * gpu_memory_utilization) - used - step_bytes - graph_bytes


def cuda_available(gpu_memory_utilization: float, step_bytes: int, graph_bytes: int, device: torch.device) -> int:
    """Bytes for the KV cache: our share of the device, less what is in use and what steps and graphs take.

    Raises DoesNotFit when the device has less free than the share asks for.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    wanted = int(total * gpu_memory_utilization)
    if free + held < wanted - CONTEXT:
        share = (free + held) / total
        raise DoesNotFit(
            f"gpu_memory_utilization {gpu_memory_utilization} asks for {wanted / GIB:.1f} of {total / GIB:.1f} GiB, "
            f"but {(free + held) / GIB:.1f} GiB are free. Set gpu_memory_utilization to {share - 0.01:.2f} or less."
        )
    available = left_for_blocks(total, total - free, gpu_memory_utilization, step_bytes, graph_bytes)
    log.info(
        "memory: %.2f of %.2f GiB may be used; %.2f are, a largest step takes %.2f, CUDA graphs %.2f: %.2f for blocks",
        *(one / GIB for one in (wanted, total, total - free, step_bytes, graph_bytes, max(available, 0))),
    )
    return max(available, 0)
