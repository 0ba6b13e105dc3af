"""Random ragged steps over poisoned blocks: the inputs that every implementation of the op is compared on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Case:
    """One step. `lengths` are (rows of this step, keys with them) of each sequence."""

    lengths: tuple[tuple[int, int], ...] = ((1, 17), (5, 5), (1, 1), (20, 37))
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    value_size: int = 0  # 0: as head_size
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    chunk: int = 0
    sinks: bool = False
    pad_tokens: int = 3
    pad_seqs: int = 2
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None  # None: dtype
    strided: bool = field(default=False)
    seed: int = 0

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k)]
        return ",".join(changed).replace(" ", "").replace("torch.", "") or "default"

    def arguments(self) -> tuple:
        """The op's arguments; every slot that holds no token of a sequence, and padding rows, are NaN."""
        g = torch.Generator().manual_seed(self.seed)
        value_size = self.value_size or self.head_size
        used = [-(-keys // self.block_size) for _, keys in self.lengths]
        num_blocks = sum(used) + 3
        blocks = (torch.randperm(num_blocks - 1, generator=g) + 1).int()
        width = max(used, default=1) + 2
        num_seqs = len(self.lengths) + self.pad_seqs
        tables = torch.zeros(num_seqs, width, dtype=torch.int32)
        key_cache = torch.full((num_blocks, self.block_size, self.kv_heads, self.head_size), torch.nan)
        value_cache = torch.full((num_blocks, self.block_size, self.kv_heads, value_size), torch.nan)
        slot_mapping, positions, starts, at = [], [], [0], 0
        for s, (rows, keys) in enumerate(self.lengths):
            tables[s, : used[s]] = blocks[at : at + used[s]]
            at += used[s]
            token = torch.arange(keys)
            slot = tables[s, token // self.block_size].long() * self.block_size + token % self.block_size
            old = slot[: keys - rows]
            key_cache.view(-1, self.kv_heads, self.head_size)[old] = torch.randn(
                len(old), self.kv_heads, self.head_size, generator=g
            )
            value_cache.view(-1, self.kv_heads, value_size)[old] = torch.randn(
                len(old), self.kv_heads, value_size, generator=g
            )
            slot_mapping.append(slot[keys - rows :])
            positions.append(token[keys - rows :])
            starts.append(starts[-1] + rows)
        tokens = starts[-1] + self.pad_tokens
        pad = torch.zeros(self.pad_tokens, dtype=torch.long)

        def rows_of(heads: int, size: int) -> torch.Tensor:
            # Strided as a slice of a merged projection is.
            wide = torch.randn(tokens, heads * size + (8 if self.strided else 0), generator=g)
            wide[starts[-1] :] = torch.nan
            return wide.to(self.dtype)[:, : heads * size].unflatten(1, (heads, size))

        return (
            rows_of(self.heads, self.head_size),
            rows_of(self.kv_heads, self.head_size),
            rows_of(self.kv_heads, value_size),
            key_cache.to(self.cache_dtype or self.dtype),
            value_cache.to(self.cache_dtype or self.dtype),
            torch.cat([*positions, pad]).int(),
            torch.cat([*slot_mapping, pad]).int(),
            tables,
            torch.tensor(starts + [starts[-1]] * self.pad_seqs, dtype=torch.int32),
            torch.tensor([keys for _, keys in self.lengths] + [0] * self.pad_seqs, dtype=torch.int32),
            torch.randn(self.heads, generator=g) if self.sinks else None,
            self.head_size**-0.5,
            self.window,
            self.softcap,
            self.chunk,
        )


def clone(arguments: tuple) -> tuple:
    """The same arguments in memory of their own, strides kept."""
    return tuple(
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype).copy_(a) if isinstance(a, torch.Tensor) else a
        for a in arguments
    )


def tolerance(dtype: torch.dtype) -> float:
    """Largest error of an output of order one."""
    return {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]


def check(out: torch.Tensor, arguments: tuple, expected: torch.Tensor, expected_arguments: tuple) -> None:
    """Outputs close, padding rows 0, written blocks equal, the poison of unused slots untouched."""
    live = int(arguments[8][-1])
    assert torch.isfinite(out[:live]).all(), "NaN from an unused slot or a padding row"
    torch.testing.assert_close(out, expected, atol=tolerance(out.dtype), rtol=tolerance(out.dtype))
    assert (out[live:] == 0).all()
    for mine, theirs in zip(arguments[3:5], expected_arguments[3:5]):
        torch.testing.assert_close(mine[1:].float(), theirs[1:].float(), rtol=0, atol=0, equal_nan=True)
