"""What each layer's attention computes and what state it keeps, read off one forward of a copy of the model on the meta device.

The copy attends under a name of its own, for which transformers hands us the function of every mask: so a layer's
window or chunk is what the model's own mask says, not what a configuration promises. Whatever the ops do not
compute is refused, and the message says what the model does. Knows nothing of weights, blocks or steps.

Comparing a small copy of each model with transformers' own forward at the start was rejected: shrinking a
configuration without knowing it fails for a quarter of the model types. The tests do that over all types.
"""

from __future__ import annotations

import copy
import inspect
import os
import traceback
import types
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from pagegraph.compiler.model.forward_local import forward_local
from pagegraph.compiler.model.head import body_of, note_bodies
from pagegraph.compiler.model.left_out import NotInstalled, towers_if_installed
from pagegraph.compiler.model.recurrent import IN_POOL, StateLayout, take_recurrence
from pagegraph.compiler.model.rope import stop_updates
from pagegraph.compiler.model.stand_in_cache import StandInCache, cache_arguments

PROBE_NAME = "pagegraph_probe"
# Layers of these types mix no tokens: they need neither attention nor state.
TOKENWISE_LAYER_TYPES = frozenset({"mlp", "moe"})
SERVED_LAYER_TYPES = TOKENWISE_LAYER_TYPES | {
    "full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "hybrid",
}  # fmt: skip
# Of the probe's packed row: tokens, a number that is no size of a model, and those of them whose logits are asked for.
TOKENS, ASKED = 37, 2
# Tensors handed to attention by name that change nothing in it, or that the paged op takes.
HEARD = frozenset({"position_ids", "logits_to_keep", "s_aux"})
# Of what PyTorch says where a size or a choice hangs on values, which the meta device has not.
READS_BACK = ("Tensor.item()", "out of meta tensor", "torch.nonzero()")
# Masks are read up to this position, beyond every window and chunk.
LONGEST = 2**30


class UnsupportedModel(ValueError):
    """The model would not run, or not run right, through our ops; the message says why."""


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """What one layer's attention computes, as probed. Sizes in elements; 0 switches a feature off."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    value_size: int
    scale: float
    window: int
    chunk: int
    softcap: float
    has_sinks: bool


@dataclass(slots=True)
class _Notes:
    """What one forward of the model called `name` showed so far."""

    name: str
    fetched: set[nn.Module] = field(default_factory=set)  # as attributes of others
    attending: dict[int, nn.Module] = field(default_factory=dict)
    layouts: dict[int, AttentionLayout] = field(default_factory=dict)
    states: dict[int, StateLayout] = field(default_factory=dict)
    forms: dict[Callable[..., torch.Tensor], tuple[int, int]] = field(
        default_factory=dict
    )  # window and chunk of a mask function

    def refuse(self, why: str) -> NoReturn:
        raise UnsupportedModel(f"{self.name}: {why}")


@dataclass(frozen=True, slots=True)
class Probed:
    """What the layers compute, how the forward is called, where its body is, and what text does not need.

    layouts, states: of the layers that attend and of those that keep state, in order; a layer may do both.
    cache: name of the argument by which the forward wants a `StandInCache`; "" where it wants none.
    body: path of the module whose output the head computes logits from; "" where the head needs more than that.
    hidden_size: of that output; 0 where there is no body.
    takes_rows: the forward heeds whose logits are asked for; otherwise the body's output has to be theirs alone.
    towers: paths of modules beside the decoder that hold weights and that the forward of text does without.
    """

    layouts: list[AttentionLayout]
    states: list[StateLayout]
    cache: str
    body: str
    hidden_size: int
    takes_rows: bool
    towers: list[str] = field(default_factory=list)
    attending: dict[str, AttentionLayout] = field(default_factory=dict)  # layouts by path of the module that attends
    num_logits: int = 0


def probe(original: nn.Module, prepare: Callable[[nn.Module], object] = lambda shadow: None) -> Probed:
    """What the layers of `original` compute. A copy built by its configuration is run, `original` is not changed.

    prepare: called with the copy first.

    Raises UnsupportedModel where a layer mixes tokens outside attention and known recurrences, or in a way that the ops do
    not compute.
    """
    name, layers = original.config.model_type, original.config.get_text_config().num_hidden_layers
    _refuse_by_configuration(original)
    # In bfloat16, the type that grouped expert matmuls accept on the meta device.
    with torch.device("meta"), towers_if_installed(original.config):
        shadow = type(original)._from_config(
            copy.deepcopy(original.config), dtype=torch.bfloat16, attn_implementation=PROBE_NAME
        )
    prepare(shadow)
    stop_updates(shadow)
    ask_for_no_padding(shadow)
    outputs = note_bodies(shadow)
    positions = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    has_state, argument = take_recurrence(shadow), _cache_argument(shadow)
    for with_cache in (True,) if has_state else (False, True):
        notes, watch = _Notes(name), _Watch(positions)
        past = _ProbedCache(positions, notes, has_state) if with_cache else None
        for module in shadow.modules():
            module.notes = notes
        try:
            with torch.no_grad(), _one_sequence(), _noting_fetches(notes), watch:
                logits = shadow(
                    input_ids=torch.zeros_like(positions),
                    position_ids=positions,
                    use_cache=False,
                    logits_to_keep=torch.zeros(ASKED, dtype=torch.long, device="meta"),
                    **({} if past is None else cache_arguments(argument, past, positions)),
                ).logits
        except UnsupportedModel:
            raise
        except Exception as error:
            if with_cache and not has_state:
                break
            if missing := _asked_besides(shadow):
                notes.refuse(f"its forward asks for {', '.join(missing)}, which text does not have")
            if "Tensor.item()" in str(error) and (rotary := _rotary_embedding_at(error)) is not None:
                notes.refuse(
                    "its rope depends on the length of the sequence in a way that the forward of"
                    f" {type(rotary).__name__} decides"
                    " anew each time, and the sequences of a step share one rope"
                )
            if any(sign in str(error) for sign in READS_BACK):
                notes.refuse(
                    "its forward reads results back to decide how to go on, which a step launched ahead of its results"
                    " cannot"
                )
            notes.refuse(
                f"the forward does not run on packed sequences without a cache ({type(error).__name__}: {error})"
            )
        finally:
            forward_local.recurrence = None
        if not notes.layouts and not notes.states:
            notes.refuse(
                "none of its layers attends through transformers' attention interface: they have code of their own for it,"
                " which paged attention does not stand in for, or do not attend"
            )
        mixing = {*range(layers)} - _tokenwise_layers(original) - _skipped_layers(shadow, notes, watch)
        if missing := sorted(mixing - notes.layouts.keys() - notes.states.keys()):
            notes.refuse(
                f"{len(missing)} of {layers} layers ({_listed(missing)}) neither attend through the attention interface"
                " nor keep a state that is known here; they would run without their state and give wrong answers."
                " Serve a model of other layers."
            )
        if watch.convolved:
            notes.refuse("a layer convolves tokens in a way of its own, whose state would be lost between steps")
        body, hidden_size = body_of(shadow, outputs, (TOKENS, logits.shape[-1]))
        takes_rows = logits.shape[1] == ASKED
        if not takes_rows and not body:
            notes.refuse(
                f"the forward gives logits of {logits.shape[1]} of {TOKENS} tokens where {ASKED} are asked for"
            )
        if watch.padded_positions:
            notes.refuse("its positions start behind a padding index; paged attention numbers tokens from 0")
        if watch.counted == (0 if past is None else past.asked):
            layouts, states = ([found[layer] for layer in sorted(found)] for found in (notes.layouts, notes.states))
            towers = _towers(shadow, notes, watch)
            attending = {
                path: notes.layouts[module.layer_idx]
                for path, module in shadow.named_modules()
                if module in notes.attending.values() and module.layer_idx in notes.layouts
            }
            return Probed(
                layouts,
                states,
                argument if with_cache else "",
                body,
                hidden_size,
                takes_rows,
                towers,
                attending,
                logits.shape[-1],
            )
    notes.refuse("the forward numbers its tokens by their place in the step, not by the positions it is given")


def _cache_argument(model: nn.Module) -> str:
    """How the model's forward calls its cache; pure state space models have a name of their own."""
    names = inspect.signature(model.forward).parameters
    return "cache_params" if "cache_params" in names else "past_key_values"


def _listed(layers: list[int]) -> str:
    """The first few."""
    return ", ".join(map(str, layers[:4])) + (", ..." if len(layers) > 4 else "")


def _tokenwise_layers(model: nn.Module) -> set[int]:
    """Layers that configuration says mix no tokens."""
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return {layer for layer, kind in enumerate(types) if kind in TOKENWISE_LAYER_TYPES}


def _asked_besides(model: nn.Module) -> list[str]:
    """Arguments without a default of the model's forward that a step does not give."""
    asked = inspect.signature(model.forward).parameters.values()
    return [
        one.name
        for one in asked
        if one.kind is one.POSITIONAL_OR_KEYWORD and one.default is one.empty and one.name != "input_ids"
    ]


@contextmanager
def _noting_fetches(notes: _Notes) -> Iterator[None]:
    """While within, modules that code looks up as attributes of others are noted, called or not."""
    get = nn.Module.__getattr__

    def get_noted(module: nn.Module, name: str) -> Any:
        found = get(module, name)
        if isinstance(found, nn.Module):
            notes.fetched.add(found)
        return found

    nn.Module.__getattr__ = get_noted
    try:
        yield
    finally:
        nn.Module.__getattr__ = get


def _path_of_layers(shadow: nn.Module, notes: _Notes) -> list[str]:
    """Names on the way to what all attending layers are in."""
    attending = [path for path, module in shadow.named_modules() if module in notes.attending.values()]
    return list(os.path.commonprefix([path.split(".") for path in attending]))


def _is_unread(module: nn.Module, watch: _Watch) -> bool:
    """Whether it has parameters and the forward read none of them."""
    own = {id(one) for one in module.parameters()}
    return bool(own) and own.isdisjoint(watch.read)


def _skipped_layers(shadow: nn.Module, notes: _Notes, watch: _Watch) -> set[int]:
    """Layers that text does not go through, as those that attend to images alone."""
    layers = shadow.get_submodule(".".join(_path_of_layers(shadow, notes)))
    if not isinstance(layers, nn.ModuleList):
        return set()
    return {index for index, layer in enumerate(layers) if _is_unread(layer, watch)}


def _towers(shadow: nn.Module, notes: _Notes, watch: _Watch) -> list[str]:
    """Outermost modules of a model of more than text, outside of its layers, that the forward did not even look up."""
    if not shadow.config.sub_configs:
        return []
    layers, found = _path_of_layers(shadow, notes), []

    def look(module: nn.Module, path: list[str]) -> None:
        for name, child in module.named_children():
            at = [*path, name]
            if isinstance(child, NotInstalled) or _is_unread(child, watch) and child not in notes.fetched:
                found.append(".".join(at))
            elif at == layers[: len(at)] and at != layers:
                look(child, at)

    look(shadow, [])
    return found


def _rotary_embedding_at(error: Exception) -> nn.Module | None:
    """The rotary embedding in whose forward `error` was raised, if it was in one."""
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((one for one in owners if isinstance(one, nn.Module) and hasattr(one, "rope_type")), None)


def ask_for_no_padding(model: nn.Module) -> None:
    """Keep modules of `model` from reading token ids back to look for padding: packed sequences have none."""
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = _no_warning


def _no_warning(*_: Any) -> None:
    """Stands for a transformers check that does not apply to packed sequences."""


def _refuse_by_configuration(model: nn.Module) -> None:
    config = model.config.get_text_config()
    notes = _Notes(model.config.model_type)
    if unserved := sorted(set(getattr(config, "layer_types", None) or ()) - SERVED_LAYER_TYPES):
        if sparse := [one for one in unserved if "sparse" in one]:
            notes.refuse(
                f"its layers of type {', '.join(sparse)} attend sparsely, each token to those that an index chooses for"
                " it; paged attention keeps no such index"
            )
        notes.refuse(
            f"no op here computes layers of type {', '.join(unserved)};"
            f" served are {', '.join(sorted(SERVED_LAYER_TYPES))}"
        )
    if getattr(config, "alibi", False) or config.model_type in {"bloom", "mpt"}:
        notes.refuse("ALiBi position biases are not computed by paged attention")


def _probed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature; notes the layout of the layer and returns zeros [1, T, Hq, Dv]."""
    notes = cast(_Notes, module.notes)
    layer = module.layer_idx
    if layer in notes.layouts:
        notes.refuse(f"layer {layer} attends more than once, and paged memory holds one set of keys and values a layer")
    function = getattr(attention_mask, "mask_function", None)
    if query.shape[1] % key.shape[1]:
        notes.refuse(
            f"layer {layer} has {query.shape[1]} attention heads over {key.shape[1]} of keys and values"
            " (num_key_value_heads):"
            " the one must be a multiple of the other"
        )
    if attention_mask is None:
        notes.refuse(f"layer {layer} attends without a mask, to later tokens too; only causal attention is served")
    if function is None:
        notes.refuse(f"layer {layer} makes a mask of its own, which paged attention does not read")
    if function not in notes.forms:
        notes.forms[function] = _form(function) or notes.refuse(
            f"the mask of layer {layer} is neither causal, nor a sliding window, nor in chunks; paged attention"
            " computes no other"
        )
    if unheard := sorted(
        name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name not in HEARD
    ):
        notes.refuse(
            f"layer {layer} hands {', '.join(unheard)} to attention, which paged attention does not compute with"
        )
    window, chunk = notes.forms[function]
    notes.attending[layer] = module
    notes.layouts[layer] = AttentionLayout(
        layer=layer,
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_size=key.shape[3],
        value_size=value.shape[3],
        scale=float(scaling) if scaling is not None else query.shape[3] ** -0.5,
        window=window,
        chunk=chunk,
        softcap=float(kwargs.get("softcap") or 0.0),
        has_sinks=kwargs.get("s_aux") is not None,
    )
    return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


class _ProbedCache(StandInCache):
    """Notes what state each layer keeps, of which there may be one convolution and one recurrence."""

    def __init__(self, positions: torch.Tensor, notes: _Notes, has_state: bool) -> None:
        super().__init__(positions, partial(_ProbedRecurrence, notes) if has_state else None)
        self.notes = notes

    def update_conv_state(self, inputs: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> torch.Tensor:
        if state_idx or layer_idx in self.notes.states:
            self.notes.refuse(
                f"layer {layer_idx} convolves more than once, and slots hold one convolution's rows a layer"
            )
        return super().update_conv_state(inputs, layer_idx)

    def update_recurrent_state(self, states: Any, layer_idx: int, **_: Any) -> Any:
        if states is not IN_POOL:
            self.notes.refuse(f"layer {layer_idx} computes its recurrent state in a way that no op here does")
        return states


@dataclass(slots=True)
class _ProbedRecurrence:
    """A `Recurrence` that notes sizes and gives tensors without values."""

    notes: _Notes
    layer: int

    def causal_conv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool) -> torch.Tensor:
        self.notes.states[self.layer] = StateLayout(self.layer, (weight.shape[1] - 1, weight.shape[0]), ())
        return torch.empty_like(x)

    def gated_delta(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        *_: Any,
    ) -> torch.Tensor:
        self._keep((key.shape[1], key.shape[2], value.shape[2]), key, value, decay, beta)
        return torch.empty_like(value)

    def selective_scan(
        self, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *_: Any
    ) -> torch.Tensor:
        self._keep((x.shape[1], x.shape[2], B.shape[2]), x, dt, B)
        return torch.empty_like(x, dtype=torch.float32)

    def _keep(self, sizes: tuple[int, ...], *inputs: torch.Tensor) -> None:
        if self.layer not in self.notes.states or self.notes.states[self.layer].recurrent:
            self.notes.refuse(f"layer {self.layer} has a recurrence without a convolution, or several")
        taken = sum(one[0].numel() for one in inputs)
        self.notes.states[self.layer] = replace(self.notes.states[self.layer], recurrent=sizes, inputs=taken)


def _probed_mask(
    *, batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Any], **_: Any
) -> torch.Tensor:
    """transformers' mask signature: a mask without values that carries the function it would be made with."""
    mask = torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    mask.mask_function = mask_function
    return mask


AttentionInterface.register(PROBE_NAME, _probed_attention)
AttentionMaskInterface.register(PROBE_NAME, _probed_mask)


def _form(function: Callable[..., Any]) -> tuple[int, int] | None:
    """(window, chunk) of a mask function of transformers, 0 where it has none; None where it is of another form."""
    function = _with_values(function)

    def sees(token: int, position: int) -> bool:
        return bool(function(0, 0, torch.tensor(token), torch.tensor(position)))

    def first_of(token: int) -> int:
        return bisect_left(range(token), True, key=partial(sees, token))

    try:
        start, window, chunk = first_of(LONGEST), 0, 0
        if start and first_of(LONGEST - 1) == start - 1:  # a window moves with the token
            window = LONGEST - start + 1
        elif start:
            chunk = start - first_of(start - 1)
        size = window or chunk
        for token in sorted({0, 1, 2, 63, *range(max(size - 1, 0), size + 2), 2 * size, 3 * size + 1, LONGEST}):
            first = token - token % chunk if chunk else max(token - window + 1, 0) if window else 0
            near = torch.arange(-4, 5)
            positions = torch.cat([token + near, first + near, torch.linspace(0, 2 * token, 1024).long()]).clamp(0)
            seen = torch.as_tensor(function(0, 0, torch.tensor(token), positions)).expand(positions.shape)
            if not torch.equal(seen, (positions >= first) & (positions <= token)):
                return None
    except Exception:  # a function of the model's own, which may want anything
        return None
    return window, chunk


def _with_values(part: Any) -> Any:
    """`part` of a mask function, with zeros for every tensor of the meta device in it: no padding, nothing marked.

    One that the forward filled with a number has it, for as many tokens as are asked for.
    """
    if isinstance(part, torch.Tensor) and (filled := getattr(part, "filled", None)) is not None:
        return torch.tensor(filled, dtype=part.dtype).expand(*part.shape[:-1], 2 * LONGEST + 1)
    if isinstance(part, torch.Tensor):
        return torch.zeros(part.shape, dtype=part.dtype) if part.is_meta else part
    if isinstance(part, tuple):
        return tuple(map(_with_values, part))
    if not isinstance(part, types.FunctionType) or not part.__closure__:
        return part
    cells = tuple(types.CellType(_with_values(cell.cell_contents)) for cell in part.__closure__)
    return types.FunctionType(part.__code__, part.__globals__, part.__name__, part.__defaults__, cells)


@contextmanager
def _one_sequence() -> Iterator[None]:
    """Masks are made for one sequence: looking for several in the positions would need their values."""
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


class _Watch(TorchDispatchMode):
    """Counts how often a forward numbers its tokens; notices position tables that have a row for padding, and convolutions.

    read: `id` of each parameter that an operation took.
    """

    def __init__(self, positions: torch.Tensor) -> None:
        super().__init__()
        self.positions = positions
        self.counted = 0
        self.padded_positions = False
        self.read: set[int] = set()
        self.convolved = False

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.read |= {id(one) for one in tree_leaves((args, kwargs)) if isinstance(one, nn.Parameter)}
        if function.overloadpacket is torch.ops.aten.arange:
            self.counted += out.numel() == TOKENS
        if function.overloadpacket is torch.ops.aten.full:
            out.filled = args[1]
        if function.overloadpacket is torch.ops.aten.convolution:
            self.convolved |= args[1].shape[-1] > 1
        if function.overloadpacket is torch.ops.aten.embedding and args[1] is self.positions:
            self.padded_positions |= len(args) > 2 and args[2] >= 0
        return out
