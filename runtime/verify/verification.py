"""Everything that is compared, in the order that holds one copy of the weights at a time, and what came of it.

The reference first: its results are kept, its weights freed. Then the engine: passes over modules while it is built, its
modules layer by layer, passes over the graph, the compiled forward, and requests. Knows no output form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from pagegraph.compiler.build import BuiltModel, LoadedModel, build_model, plan_models
from pagegraph.compiler.options import CompilerOptions
from pagegraph.compiler.passes.registry import graph_passes
from pagegraph.compiler.verify.bands import BIT_FOR_BIT, TIMES, Band, floor_of
from pagegraph.compiler.verify.difference import Positions, Summary, joined, positions_of, summary_of
from pagegraph.compiler.verify.layers import ROWS, errors, layers_of, report, watched
from pagegraph.compiler.verify.passes import ModulePasses, PassCheck, check_compiled, check_graph_passes
from pagegraph.compiler.verify.reference import Reference, compute_reference, free, is_quantised, stock_model
from pagegraph.compiler.verify.steps import prompt_logits
from pagegraph.runtime.config import Config, ConfigError
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.server.start_errors import load_tokenizer
from pagegraph.runtime.verify.itself import DRAFT_TOKENS, Equality, Itself, first_difference
from pagegraph.runtime.verify.prompts import QUICK, TEXTS, long_text

NUM_TOKENS, QUICK_TOKENS = 32, 16  # one block of the KV cache at least
LAST, QUICK_LAST = 128, 32  # positions of a prompt that are compared: its last ones
LONGEST = 1200  # tokens of the prompt that is to reach beyond a sliding window
LAYERED = 2  # prompts, the longest ones, of which every module is compared
FEWEST = 2  # tokens of a prompt: of one alone, a step is of another kind
AGAINST, LAYERS, PASSES, ITSELF = "transformers", "layers", "passes", "itself"


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for beside the configuration. texts: None for the built-in ones."""

    texts: Sequence[str] | None = None
    quick: bool = False

    @property
    def num_tokens(self) -> int:
        return QUICK_TOKENS if self.quick else NUM_TOKENS

    @property
    def last(self) -> int:
        return QUICK_LAST if self.quick else LAST


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. ok: None where it could not be made."""

    section: str
    name: str
    ok: bool | None
    says: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Verification:
    """Of one configuration on one device."""

    model: str
    device: str
    dtype: str
    quantised: bool
    torch: str
    transformers: str
    prompts: int
    prompt_tokens: int
    num_tokens: int
    band: Band
    own: Summary | None  # transformers in the engine's dtype, against itself in float32
    notes: list[str]
    checks: list[Check]

    @property
    def differs(self) -> list[Check]:
        return [one for one in self.checks if one.ok is False]

    def as_json(self) -> dict[str, Any]:
        """Plain values; log-probabilities in nats, layers' errors as shares; null is beyond every number."""
        return _finite(asdict(self)) | {"ok": not self.differs}


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verify(config: Config, asked: Asked, say: Callable[[str], None] = lambda line: None) -> Verification:
    """Compare. `say` is told what takes long.

    Raises ConfigError for a model or prompts that cannot be compared, and what a start raises for files, settings and
    devices.
    """
    options = compiler_options(config)
    planned = plan_models(options)[0]
    config = _with_drafts(config)
    options = compiler_options(config)
    if not planned.paged_model.has_head:
        raise ConfigError(f"model={config.model} has no output head: it gives embeddings, and no tokens to compare")
    prompts, notes = _prompts(config, asked, planned)
    layered = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]))[:LAYERED]
    quantised = is_quantised(options, planned)
    mixture = any(path.endswith("experts") for path, _ in planned.paged_model.named_modules())
    dtype = planned.dtype
    with TemporaryDirectory(prefix="pagegraph-verify-") as folder:
        say(f"transformers on {len(prompts)} prompts")
        stock = stock_model(options, planned)
        reference = compute_reference(
            stock, prompts, dtype=dtype, num_tokens=asked.num_tokens, last=asked.last, layered=layered,
            folder=Path(folder),
        )  # fmt: skip
        del stock, planned
        free(options.device)
        own = None
        if dtype != torch.float32:
            own = summary_of(joined([one.own for one in reference.prompts if one.own is not None]))
        band = floor_of(dtype, quantised, mixture)
        band = band if own is None else band.widened(own)
        say("building the engine's model")
        stream = [token for prompt in prompts for token in prompt]
        watch = ModulePasses(stream)
        built = build_model(options, progress=False, watch=watch)
        try:
            checks = _engine_checks(config, options, asked, built, reference, band, watch, stream, say)
        finally:
            built.close()
    return Verification(
        model=config.model_name,
        device=str(options.device),
        dtype=str(dtype).removeprefix("torch."),
        quantised=quantised,
        torch=torch.__version__,
        transformers=transformers.__version__,
        prompts=len(prompts),
        prompt_tokens=sum(map(len, prompts)),
        num_tokens=asked.num_tokens,
        band=band,
        own=own,
        notes=notes,
        checks=checks,
    )


def _with_drafts(config: Config) -> Config:
    """With the speculation that is compared: the configuration's, else n-grams."""
    number = config.num_speculative_tokens or DRAFT_TOKENS
    return replace(config, speculative_method=config.method or "ngram", num_speculative_tokens=number)


def _prompts(config: Config, asked: Asked, planned: LoadedModel) -> tuple[list[list[int]], list[str]]:
    """Token ids, and what there is to say of them."""
    tokenizer, notes = load_tokenizer(config), []
    room = planned.max_model_len - asked.num_tokens - 1
    if room < FEWEST:
        raise ConfigError(
            f"max_model_len={planned.max_model_len} leaves no room for a prompt and {asked.num_tokens} tokens behind it;"
            f" set it to {asked.num_tokens + 64} or more"
        )
    texts = asked.texts if asked.texts is not None else TEXTS[:QUICK] if asked.quick else TEXTS
    prompts = [tokenizer.encode(text) for text in texts]
    windows = sorted({layout.window or layout.chunk for layout in planned.paged_model.layouts} - {0})
    if asked.texts is None and windows:
        wanted = windows[-1] + 2 * ROWS
        if wanted <= min(LONGEST, room):
            number = 1
            while len(ids := tokenizer.encode(long_text(number))) < wanted:
                number += 1
            prompts.append(ids[:wanted])
    if cut := sum(len(ids) > room for ids in prompts):
        notes.append(f"{cut} prompts are cut to {room:,} tokens, which max_model_len leaves them")
    prompts = [ids[:room] for ids in prompts]
    longest = max(map(len, prompts))
    notes += [
        f"no prompt reaches beyond the window or chunk of {window:,} tokens of some layers: give a longer one with --prompts"
        for window in windows
        if longest <= window
    ]
    if short := [text for text, ids in zip(texts, prompts) if len(ids) < FEWEST]:
        raise ConfigError(f"the prompt {short[0]!r} is a single token; give texts of at least {FEWEST} tokens")
    return prompts, notes


def _engine_checks(
    config: Config,
    options: CompilerOptions,
    asked: Asked,
    built: BuiltModel,
    reference: Reference,
    band: Band,
    watch: ModulePasses,
    stream: list[int],
    say: Callable[[str], None],
) -> list[Check]:
    say("the engine's layers")
    layers = _layers(built, reference, band)
    passes = [_pass(one, band) for one in watch.checks]
    forward = None
    if options.compile:
        say("passes over the graph")
        built.build_cpp()
        passes += [
            _pass(one, band) for one in check_graph_passes(built, graph_passes(options.passes, options.device), stream)
        ]
        say("compiling")
        built.compile()
        passes.append(_pass(check_compiled(built, stream), band))
        forward = built.step.forward if built.step.paged_model.body else None
    built.capture_graphs(progress=False)
    say("the engine on the same prompts")
    found = joined(
        [
            positions_of(one.logits, prompt_logits(built, one.token_ids, asked.last, forward), one.followed)
            for one in reference.prompts
        ]
    )
    itself = Itself(config, built, [one.prompt for one in reference.prompts], asked.num_tokens)
    against = [_forced(found, band), _greedy(reference, itself.token_ids, band)]
    equalities = []
    for way in itself.ways():
        say(f"the engine against itself, {len(equalities) + 1} of {len(itself.ways())}")
        equalities.append(_equality(way(), BIT_FOR_BIT if config.deterministic else band, asked.num_tokens))
    return [*against, layers, *passes, *equalities]


def _forced(found: Positions, band: Band) -> Check:
    leaves, whole = band.leaves(found), summary_of(found)
    says = (
        f"{100 * whole.top1:.1f} % of {whole.positions:,} likeliest tokens; KL {whole.kl:.2g}, log-probability error"
        f" {whole.mean:.2g}, at most {whole.largest:.2g}"
    )
    return Check(AGAINST, "teacher-forced", not leaves, "; ".join([says, *leaves]), asdict(whole))


def _greedy(reference: Reference, got: list[list[int]], band: Band) -> Check:
    differing = []
    for index, (one, ours) in enumerate(zip(reference.prompts, got, strict=True)):
        place = first_difference(one.output, ours)
        if place is None:
            continue
        logits = one.logits_at(place)
        best, second = logits.topk(2).values.tolist()
        margin = best - logits[ours[place]].item() if place < len(ours) else float("inf")
        differing.append(
            {"prompt": index, "token": place, "expected": one.output[place], "found": ours[place], "margin": margin,
             "best_two": best - second}
        )  # fmt: skip
    same = len(got) - len(differing)
    says = f"{same} of {len(got)} outputs are the same"
    for one in differing:
        tie = "a tie" if one["margin"] <= band.tie else f"no tie: that is up to {band.tie:.2g}"
        says += f"; {one['prompt']} differs at token {one['token']}, {one['margin']:.2g} below the best: {tie}"
    apart = sum(not one["margin"] <= band.tie for one in differing)
    fault = apart > band.strays * sum(len(one.output) for one in reference.prompts)
    return Check(AGAINST, "greedy", not fault, says, {"same": same, "of": len(got), "differing": differing})


@torch.inference_mode()
def _layers(built: BuiltModel, reference: Reference, band: Band) -> Check:
    model = built.step.paged_model.model
    layers, found = layers_of(model), []
    for one in reference.layers:
        with watched(model, len(one.token_ids), one.outputs.whole) as outputs:
            prompt_logits(built, one.token_ids, ROWS)
        found.append(errors(one.outputs, outputs, layers))
        one.outputs.whole.clear()
    said = report(found, [one.own for one in reference.layers if one.own], band.layer, TIMES, layers)
    says = (
        f"{len(layers)} layers; worst {said.worst}: error {said.error:.2g} of what it adds, allowed {said.allowed:.2g}"
    )
    if said.outside:
        few = ", ".join(said.outside[:3]) + (f" and {len(said.outside) - 3} more" if len(said.outside) > 3 else "")
        says = f"first at {said.culprit}; outside of the band: {few}; {says}"
    return Check(LAYERS, "given the same input", not said.outside, says, asdict(said))


def _pass(one: PassCheck, band: Band) -> Check:
    leaves, whole = band.leaves(one.found), summary_of(one.found)
    changed = "all of it" if one.changes is None else f"{one.changes} places"
    says = f"{changed}; KL {whole.kl:.2g}, log-probability error at most {whole.largest:.2g}"
    name = f"{one.kind}: {one.name}"
    return Check(PASSES, name, not leaves, "; ".join([says, *leaves]), asdict(whole) | {"changes": one.changes})


def _equality(one: Equality, band: Band, num_tokens: int) -> Check:
    figures = {name: value for name, value in asdict(one).items() if name != "errors"}
    if not one.happened:
        return Check(ITSELF, one.name, None, "could not be made to happen with these prompts and settings", figures)
    apart = [(at, place, margin) for at, place, margin in one.differing if not margin <= band.tie]
    ties = len(one.differing) - len(apart)
    says = [f"{one.happened}; {one.prompts - len(one.differing)} of {one.prompts} outputs are the same"]
    says[0] += f", {ties} part at a tie" * bool(ties)
    says += [f"{at} differs at token {place}, no tie: {margin:.2g} between the best two" for at, place, margin in apart]
    far = band.strayed(one.errors, [-math.inf] * len(one.errors))
    if one.errors:
        figures["largest"] = max(one.errors)
        allowed = f", allowed {band.largest:.2g}" * bool(far)
        says.append(f"log-probabilities differ by at most {max(one.errors):.2g}{allowed}")
    fault = far or len(apart) > band.strays * one.prompts * num_tokens
    return Check(ITSELF, one.name, not fault, "; ".join(says), figures)
