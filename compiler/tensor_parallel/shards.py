"""What a rank holds of a tensor, and of a model: plain values, made by `compiler.tensor_parallel.plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

# What a rank's module does besides its own product: sum over ranks; the same of the rank's columns of a whole input; bring
# all ranks' outputs side by side; look up the rank's rows of a vocabulary and sum; sum what experts give, be they
# cut or whole.
Role = Literal["reduce", "split_reduce", "gather", "vocabulary", "experts", "whole_experts"]
LARGEST_SIZE = 64  # up to which numbers of ranks are tried for one that works


@dataclass(frozen=True, slots=True)
class Ranks:
    """So many processes, of which this is one; `group`: their name among `kernels.collective.groups`.

    expert_parallel: each holds whole experts of a mixture, and not a part of every one.
    """

    rank: int = 0
    size: int = 1
    group: str = ""
    expert_parallel: bool = False


ALONE = Ranks()


@dataclass(frozen=True, slots=True)
class Shard:
    """The `index`-th of `of` equal runs of dimension `dim`, counted from the last (below 0); of each of `parts` that lie there
    side by side, such as gate and up.
    """

    dim: int
    index: int
    of: int
    parts: int = 1

    def runs(self, size: int) -> list[slice]:
        """Of a dimension of so many elements those that are held."""
        part = size // self.parts
        each = part // self.of
        return [slice(at * part + self.index * each, at * part + (self.index + 1) * each) for at in range(self.parts)]

    def shape(self, whole: Sequence[int]) -> list[int]:
        """Of a tensor of shape `whole` that of what is held."""
        held = list(whole)
        held[self.dim] //= self.of
        return held

    def whole(self, held: Sequence[int]) -> list[int]:
        """The inverse of `shape`."""
        shape = list(held)
        shape[self.dim] *= self.of
        return shape

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is held of a whole tensor: a view where it is one run."""
        return self.read(tensor, tensor.shape)

    def read(self, source: Any, shape: Sequence[int]) -> torch.Tensor:
        """The same of a tensor, or of a slice of a safetensors file, which reads no more than that."""
        at = len(shape) + self.dim
        runs = [source[(slice(None),) * at + (run,)] for run in self.runs(shape[at])]
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim=self.dim)

    def transposed(self) -> Shard:
        """The same of the tensor whose last two dimensions are exchanged."""
        return replace(self, dim={-1: -2, -2: -1}.get(self.dim, self.dim))

    def of_part(self) -> Shard:
        """The same of a tensor that is one of the parts."""
        return Shard(self.dim, self.index, self.of)


@dataclass(frozen=True, slots=True)
class Sharding:
    """What one rank holds of a model: shards by parameter, roles by path of module. Whatever is not named is held whole."""

    ranks: Ranks
    shards: dict[str, Shard]
    roles: dict[str, Role]

    @property
    def num_sums(self) -> int:
        """Of hidden states over ranks, in one forward."""
        return sum(role != "gather" for role in self.roles.values())
