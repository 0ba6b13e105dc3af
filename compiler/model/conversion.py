"""Which parameter of a model each tensor of a checkpoint becomes, or is a part of: transformers' own rules, name by name.

transformers keeps for each type of model how a checkpoint's names become those of its modules, and what is done on the
way (`conversion_mapping`): names change, and experts are stacked to one parameter a layer. Stacking is told here as a
place, so that an expert's tensor goes there by itself; whatever else a rule does, transformers does. Knows names; reads
no tensor, and knows no model by name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from pagegraph.compiler.model.left_out import is_left_out


class Place(NamedTuple):
    """Where one tensor goes: a parameter, an expert's rows of one, or what a rule makes of it."""

    target: str
    expert: int | None = None  # of a stacked parameter [E, ..]; None: all of it
    part: int = 0  # which of `parts` runs of rows, equally many each
    parts: int = 1
    rule: WeightConverter | None = None  # what transformers does with all tensors of a target
    pattern: str = ""  # of the rule: which of its sources this is

    def rows(self, of_expert: int) -> slice:
        """Of an expert's so many rows those of this tensor."""
        each = of_expert // self.parts
        return slice(self.part * each, (self.part + 1) * each)

    @property
    def others(self) -> tuple[str, ...]:
        """Parameters that the rule gives besides."""
        first, *others = self.rule.target_patterns if self.rule is not None else ("",)
        return tuple(self.target.replace(first, other) for other in others)


class Conversion:
    """transformers' rules for one model."""

    def __init__(self, model: Any) -> None:
        rules = get_model_conversion_mapping(model)
        self._model = model
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        self._wanted = model.state_dict()

    def place(self, name: str) -> Place | None:
        """Of the checkpoint's tensor `name`; None: the model has nothing of the kind."""
        prefix = self._model.base_model_prefix
        plain, _ = rename_source_key(name, self._renamings, [])
        target, pattern = rename_source_key(plain, [], self._converters, prefix, self._wanted)
        if target not in self._wanted and name in self._wanted:
            return Place(name)
        if target not in self._wanted:
            return None
        if pattern is None:
            return Place(target)
        rule = self._by_pattern[pattern]
        number = re.search(pattern.replace("*.", r"(?P<number>\d+)\.", 1), plain)
        if not _stacks(rule) or number is None:
            return Place(target, rule=rule, pattern=pattern)
        sources = rule.source_patterns
        return Place(target, int(number["number"]), sources.index(pattern), len(sources))

    def leaves_out(self, name: str) -> bool:
        """Whether the checkpoint's tensor `name` is of a module that was taken out of the model."""
        plain, _ = rename_source_key(name, self._renamings, [])
        return any(is_left_out(self._model, one) for one in (name, plain, f"{self._model.base_model_prefix}.{plain}"))

    def convert(self, named: dict[str, Place], read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """What a rule makes of all tensors of one target: parameters by name."""
        first = next(iter(named.values()))
        rule = copy.deepcopy(first.rule)
        assert rule is not None
        for name in sorted(named, key=dot_natural_key):
            rule.add_tensor(first.target, name, named[name].pattern, lambda name=name: read(name))  # type: ignore[arg-type]
        made = rule.convert(first.target, model=self._model, config=self._model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


def _stacks(rule: WeightConverter) -> bool:
    """Whether it stacks experts, each of whose tensors is a run of rows."""
    done = [(type(one), getattr(one, "dim", None)) for one in rule.operations]
    merged = [(MergeModulelist, 0)]
    return done == (merged if len(rule.source_patterns) == 1 else [*merged, (Concatenate, 1)])
