"""What `runtime explain` says of a configuration, as the search asks for it: rates of steps, memory.

Plans the model on the meta device; loads nothing. Measures the device's rates for a moment.
"""

from __future__ import annotations

import dataclasses

from pagegraph.compiler.build import LoadedModel, plan_models
from pagegraph.compiler.explain.ledger import ledger
from pagegraph.compiler.explain.roofline import StepFloor
from pagegraph.compiler.options import CompilerOptions
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.explain.explanation import Asked, explain
from pagegraph.runtime.explain.text import size
from pagegraph.runtime.tune.knobs import ROOM

HOST_SHARE = 0.9  # of a machine's memory, beyond which it swaps or is ended


class Explained:
    """Of `config` and of steps up to `ROOM` times as large; sequences are `context` tokens long."""

    def __init__(self, config: Config, context: int) -> None:
        tokens = ROOM * config.batched_tokens(compiler_options(config).device.type)
        larger = dataclasses.replace(config, max_num_seqs=ROOM * config.max_num_seqs, max_num_batched_tokens=tokens)
        found = explain(larger, Asked(quick=True, context=context))
        self.machine = found.machine
        self._decodes = [one for one in found.steps if one.decode]
        self._prompts = [one for one in found.steps if not one.decode]
        self._models: dict[object, list[LoadedModel]] = {}
        self._refusals: dict[CompilerOptions, str] = {compiler_options(config): ""}

    def decode(self, seqs: int) -> StepFloor:
        """The step nearest to one of so many sequences."""
        return min(self._decodes, key=lambda one: abs(one.seqs - seqs))

    def prompts(self, tokens: int) -> StepFloor:
        """The step nearest to one of so many prompt tokens."""
        return min(self._prompts, key=lambda one: abs(one.tokens - tokens))

    def decode_rate(self, seqs: int) -> float:
        """See `Forecast`."""
        one = self.decode(seqs)
        return one.tokens / one.floor_s

    def prompt_rate(self, tokens: int) -> float:
        """See `Forecast`."""
        one = self.prompts(tokens)
        return one.tokens / one.floor_s

    def cache_share(self, seqs: int) -> float:
        """See `Forecast`."""
        one = self.decode(seqs)
        return one.cache_bytes / (one.cache_bytes + one.weight_bytes)

    def refusal(self, config: Config) -> str:
        """See `Forecast`."""
        options = compiler_options(config)
        if options not in self._refusals:
            try:
                self._refusals[options] = self._planned(options)
            except ValueError as error:  # of this checkpoint, or this device
                self._refusals[options] = str(error)
        return self._refusals[options]

    def _planned(self, options: CompilerOptions) -> str:
        which = (options.model, options.draft, options.kv_cache.dtype)
        if which not in self._models:
            self._models[which] = plan_models(options)
        held = ledger(options, self._models[which], self.machine)
        if held.refusal:
            return held.refusal
        room = HOST_SHARE * self.machine.memory
        if self.machine.device_type == "cpu" and held.allowed > room:
            return (
                f"it would take {size(held.allowed)} of weights, steps and {size(held.blocks)} of KV blocks,"
                f" of {size(room)} that this machine can spare"
            )
        return ""
