"""A model becomes one rank's share of it: sizes before weights are loaded, sums over ranks behind that.

`narrow` cuts sizes, under the names that a checkpoint's tensors have. `join` puts a module around each linear whose results are
summed or brought together, quantised or not, so that loading and quantisation know nothing of ranks. Knows the forms of linears,
embeddings and experts; what is cut is `compiler.tensor_parallel.plan`'s to say.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.compiler.model.head import NoHead
from pagegraph.compiler.tensor_parallel.shards import Ranks, Sharding


class RowParallel(nn.Module):
    """A linear over the rank's inputs; products are summed over ranks and the bias is added once.

    splits: it is given all inputs, and takes the rank's.
    """

    def __init__(self, linear: Any, ranks: Ranks, splits: bool) -> None:
        super().__init__()
        self.bias, linear.bias = linear.bias, None
        self.linear = linear
        self.group = ranks.group
        self.inputs = linear.in_features
        self.first = ranks.rank * self.inputs if splits else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.first is not None:
            hidden_states = hidden_states.narrow(-1, self.first, self.inputs)
        out = torch.ops.pagegraph.all_reduce(self.linear(hidden_states), self.group)
        return out if self.bias is None else out + self.bias


class Gathered(nn.Module):
    """A linear of the rank's outputs; those of all ranks are brought together."""

    def __init__(self, linear: Any, ranks: Ranks) -> None:
        super().__init__()
        self.linear = linear
        self.group, self.size = ranks.group, ranks.size

    @property
    def weight(self) -> torch.Tensor:
        """Of the rank; some forwards ask a head's for its dtype."""
        return self.linear.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.pagegraph.all_gather(self.linear(hidden_states), self.size, self.group)


class _RankVocabulary:
    """Before a class of embeddings: looks up the rank's rows, the first of which is token `first`, and sums over ranks."""

    first: int
    group: str
    num_embeddings: int

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = input_ids - self.first
        held = (rows >= 0) & (rows < self.num_embeddings)
        found = super().forward(torch.where(held, rows, 0))  # type: ignore[misc]
        return torch.ops.pagegraph.all_reduce(torch.where(held[..., None], found, 0), self.group)


@cache
def _rank_vocabulary(kind: type) -> type:
    """The class of embeddings `kind`, scales and all, over the rank's rows."""
    return type(f"RankVocabulary{kind.__name__}", (_RankVocabulary, kind), {"__module__": __name__})


def narrow(model: Any, sharding: Sharding) -> None:
    """Give parameters of `model`, which have no values, the sizes that the rank holds."""
    for name, shard in sharding.shards.items():
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        old = getattr(module, leaf)
        shape = shard.shape(old.shape)
        setattr(module, leaf, nn.Parameter(torch.empty(shape, dtype=old.dtype, device="meta"), requires_grad=False))
        if leaf == "weight" and isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape
        elif leaf == "weight" and isinstance(module, nn.Embedding):
            module.num_embeddings, module.padding_idx = shape[0], None
        elif sharding.roles.get(path) == "whole_experts":
            module.num_experts = shape[0]
    model.tie_weights()


def join(model: Any, sharding: Sharding) -> None:
    """Let modules of a narrowed `model` sum and gather; behind the loading of weights, if it has any."""
    ranks = sharding.ranks
    for path, role in sharding.roles.items():
        module: Any = model.get_submodule(path)
        if role in ("reduce", "split_reduce"):
            model.set_submodule(path, RowParallel(module, ranks, role == "split_reduce"))
        elif role == "gather":
            if not isinstance(module, NoHead):
                model.set_submodule(path, Gathered(module, ranks))
        elif role == "vocabulary":
            module.first, module.group = ranks.rank * module.num_embeddings, ranks.group
            module.__class__ = _rank_vocabulary(type(module))
        elif role == "experts":
            if ranks.rank and (bias := module._parameters.get("down_proj_bias")) is not None:
                bias.data.zero_()  # one rank adds it
            module.register_forward_hook(_Sum(ranks.group))
        elif role == "whole_experts":
            module.first_expert = ranks.rank * module.num_experts
            module.register_forward_hook(_Sum(ranks.group))


class _Sum:
    """A hook that sums what a module gives over ranks."""

    def __init__(self, group: str) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.ops.pagegraph.all_reduce(output, self.group)
