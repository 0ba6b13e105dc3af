"""Which weights of a model are cut among ranks, and where their results are summed: transformers' own plans, as data.

transformers keeps for most types of model a plan: a style by path of a linear or a parameter. What plans leave out has rules here:
heads of attention stay whole, and heads of keys and values are held by several ranks where there are fewer of them than ranks;
embeddings and output head are cut by the vocabulary; experts that ask for a function (`compiler.model.experts`) by their inner
size, or whole; a model without a plan by the names of its projections. What has no style is held whole by each rank: right, and not
shared. Knows names and sizes; reads no weights. Whether a model's forward runs on its shards the probe tries afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from pagegraph.compiler.model.experts import ASKING
from pagegraph.compiler.model.probe import AttentionLayout, Probed, UnsupportedModel
from pagegraph.compiler.tensor_parallel.shards import LARGEST_SIZE, Ranks, Role, Shard, Sharding

NO_PLAN = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "sinks"), "colwise"),
    **dict.fromkeys(("o_proj", "down_proj"), "rowwise"),
}  # last name of a path -> style, for a model whose plan is that of its head alone
KEYS_AND_VALUES = ("k_proj", "v_proj")
# Linears whose two halves the model's own forward takes apart by halving, whatever the plan brings together for it.
HALVED = {"gate_up_proj": "down_proj"}


class Indivisible(ValueError):
    """Sizes of the model that so many ranks cannot share; the message names them and numbers of ranks that can."""


def sharding_of(model: Any, probed: Probed, ranks: Ranks) -> Sharding:
    """What the rank holds of `model`, whose weights have no values yet and which was probed whole.

    Raises Indivisible where the model's sizes do not allow so many, UnsupportedModel where nothing says how it is shared.
    """
    if probed.states:
        raise UnsupportedModel(
            f"{model.config.model_type}: its layers with recurrent state are not shared by ranks; set tensor_parallel_size=1"
        )
    planner = _Planner(model, probed, ranks)
    if not planner.shares_layers:
        raise UnsupportedModel(
            f"{model.config.model_type}: transformers has no plan of how ranks share its layers, and its projections have names of"
            f" their own; set tensor_parallel_size=1"
        )
    if planner.refusals:
        works = [
            size
            for size in range(1, LARGEST_SIZE + 1)
            if not _Planner(model, probed, replace(ranks, rank=0, size=size)).refusals
        ]  # fmt: skip
        raise Indivisible(
            f"tensor_parallel_size={ranks.size} does not divide {planner.refusals[0]} of"
            f" {model.config.model_type}; {', '.join(map(str, works))} {'does' if len(works) == 1 else 'do'}"
        )
    if ranks.expert_parallel and "whole_experts" not in planner.roles.values():
        raise UnsupportedModel(
            f"{model.config.model_type}: expert_parallel spreads the experts of mixtures that leave them to a function of"
            " transformers, and it has none; set expert_parallel to false"
        )
    return Sharding(ranks, planner.shards, planner.roles)


class _Planner:
    """Goes through the modules of a model once."""

    def __init__(self, model: Any, probed: Probed, ranks: Ranks) -> None:
        self.ranks = ranks
        self.shards: dict[str, Shard] = {}
        self.roles: dict[str, Role] = {}
        self.refusals: list[str] = []
        self._probed = probed
        modules = dict(model.named_modules())
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        plan = {path: style for path, style in _styles(model, modules) if modules.get(path) not in (head, embedding)}
        for path, module in modules.items():
            if any(f"{path}.".startswith(f"{tower}.") for tower in probed.towers):
                continue
            if module is head or module is embedding:
                self._vocabulary(path, module, "gather" if module is head else "vocabulary")
            elif all(hasattr(module, name) for name in ASKING):
                self._experts(path, module)
            else:
                self._module(path, module, plan)
        self.shares_layers = bool(
            self.roles.keys() - {path for path, one in modules.items() if one in (head, embedding)}
        )

    def _vocabulary(self, path: str, module: nn.Module, role: Role) -> None:
        weight = module._parameters.get("weight")
        if weight is None:
            return
        if len(weight) % self.ranks.size:
            return
        for name, _ in module.named_parameters(recurse=False):
            self.shards[f"{path}.{name}"] = Shard(-2 if name == "weight" else -1, self.ranks.rank, self.ranks.size)
        self.roles[path] = role

    def _experts(self, path: str, module: Any) -> None:
        """By the inner size: rows of the first product, columns of the second. Or whole experts."""
        size, rank = self.ranks.size, self.ranks.rank
        if self.ranks.expert_parallel:
            self._divides(len(module.down_proj), f"experts of {path}")
            for name, parameter in module.named_parameters(recurse=False):
                self.shards[f"{path}.{name}"] = Shard(-parameter.dim(), rank, size)
            self.roles[path] = "whole_experts"
            return
        up = "gate_up_proj" if module.has_gate else "up_proj"
        parts = 2 if module.has_gate and module.is_concatenated else 1
        down = module.down_proj
        self._divides(down.shape[-2 if module.is_transposed else -1], f"inner elements of {path}")
        self.shards[f"{path}.{up}"] = Shard(-1 if module.is_transposed else -2, rank, size, parts)
        if f"{up}_bias" in module._parameters:
            self.shards[f"{path}.{up}_bias"] = Shard(-1, rank, size, parts)
        self.shards[f"{path}.down_proj"] = Shard(-2 if module.is_transposed else -1, rank, size)
        self.roles[path] = "experts"

    def _module(self, path: str, module: nn.Module, plan: Mapping[str, str]) -> None:
        parent, _, leaf = path.rpartition(".")
        layout = self._probed.attending.get(parent)
        style = plan.get(path)
        if HALVED.get(leaf) and plan.get(f"{parent}.{HALVED[leaf]}") == "rowwise_split_input":
            style = "packed_colwise"
        elif leaf in HALVED.values() and style == "rowwise_split_input" and f"{parent}.gate_up_proj" in plan:
            style = "rowwise"
        if isinstance(module, nn.Linear):
            if style in ("colwise", "packed_colwise", "colwise_gather_output"):
                self._columns(path, module, style, layout)
            elif style in ("rowwise", "rowwise_split_input"):
                self._rows(path, module, style, layout)
        elif style == "moe_tp_experts":
            self.roles[path] = "experts"
        for name, parameter in module.named_parameters(recurse=False):
            own = plan.get(f"{path}.{name}")
            if own is None or isinstance(module, nn.Linear):
                continue
            dim = -1 if own in ("rowwise", "packed_rowwise") or parameter.dim() == 1 else -2
            self._divides(parameter.shape[dim], f"elements of {path}.{name}")
            parts = 2 if own.startswith("packed") else 1
            self.shards[f"{path}.{name}"] = Shard(dim, self.ranks.rank, self.ranks.size, parts)

    def _columns(self, path: str, linear: nn.Linear, style: str, layout: AttentionLayout | None) -> None:
        """Outputs are cut: by heads in front of attention, of several outputs in one linear each by itself."""
        index, of = self.ranks.rank, self.ranks.size
        if style == "colwise_gather_output":
            self._divides(linear.out_features, f"outputs of {path}")
            self.roles[path] = "gather"
        elif layout is None:
            self._divides(linear.out_features // (2 if style == "packed_colwise" else 1), f"outputs of {path}")
        elif path.endswith(KEYS_AND_VALUES):
            self._divides(layout.num_kv_heads, "heads of keys and values", replicated=True)
            if layout.num_kv_heads < of:
                index, of = index * layout.num_kv_heads // of, layout.num_kv_heads
        else:
            self._divides(layout.num_heads, "attention heads")
        shard = Shard(-2, index, of, 2 if style == "packed_colwise" else 1)
        self.shards[f"{path}.weight"] = shard
        if linear.bias is not None:
            self.shards[f"{path}.bias"] = Shard(-1, index, of, shard.parts)

    def _rows(self, path: str, linear: nn.Linear, style: str, layout: AttentionLayout | None) -> None:
        """Inputs are cut; the bias is added once, behind the sum."""
        if layout is not None and style == "rowwise":
            self._divides(layout.num_heads, "attention heads")
        else:
            self._divides(linear.in_features, f"inputs of {path}")
        self.shards[f"{path}.weight"] = Shard(-1, self.ranks.rank, self.ranks.size)
        self.roles[path] = "reduce" if style == "rowwise" else "split_reduce"

    def _divides(self, count: int, what: str, replicated: bool = False) -> None:
        size = self.ranks.size
        if count % size and not (replicated and size % count == 0):
            self.refusals.append(f"the {count} {what}")


def _styles(model: Any, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Path of a module or parameter -> style."""
    plan: dict[str, str] = dict(model.tp_plan or {})
    names = [*modules, *(name for name, _ in model.named_parameters())]
    found = {name: plan[generic] for name in names if (generic := re.sub(r"(?<=\.)\d+(?=\.)", "*", name)) in plan}
    if any("." in name for name in found):
        yield from found.items()
        return
    for name in names:
        if (style := NO_PLAN.get(name.rpartition(".")[2])) is not None:
            yield name, style
