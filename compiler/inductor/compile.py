"""Inductor: the captured forward becomes machine code, and its artefacts stay in one cache folder.

Knows which sizes are dynamic and how to read back the lowered graph; knows nothing of steps or buckets.

The whole forward is one graph, not one layer compiled for all: ops span the border of layers (a layer's last linear
shares kernels with the next one's first), and rotary angles are computed once. That costs about 20 s of a cold start.
On CUDA all sizes are symbolic, so one compilation serves every capture size; a forward with constant sizes for single
tokens doubled the start and gained nothing once rotation was fused. On a CPU it is faster and stays. Merged or viewed
KV caches were rejected: functionalization clones views, so each layer's K and V enter the graph as whole tensors that
the op declares as mutated.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import safetensors
import torch
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.ir import ExternKernel, FixedLayout, MutationOutput, NoneLayout, TensorBox
from torch._inductor.lowering import (
    add_layout_constraint,
    fallback_handler,
    lowerings,
    make_fallback,
    register_lowering,
    tag_to_layout_constraint,
)
from torch._inductor.select_algorithm import ExternKernelChoice
from torch._library.utils import get_layout_constraint_tag
from torch._ops import OpOverload, OpOverloadPacket

from pagegraph.compiler.inductor.guard_free import Forward
from pagegraph.compiler.model.capture import CapturedModel
from pagegraph.compiler.step.staging import Staged
from pagegraph.compiler.step.state import DeviceState
from pagegraph.kernels.attention import cpu_decode
from pagegraph.kernels.quant import cpu_int4

DEFAULT_CACHE = "~/.cache/pagegraph"


def cache_folder(asked: str | None) -> Path:
    """Where artefacts and converted models are kept; `asked` is the configuration's word."""
    return Path(asked or DEFAULT_CACHE).expanduser()


@contextmanager
def naming_the_cache(folder: Path) -> Iterator[None]:
    """Errors of writing below `folder`, as on a full or read-only disk, become OSErrors that name the setting."""
    try:
        yield
    except Exception as error:
        at = Path(error.filename).absolute() if isinstance(error, OSError) and error.filename is not None else None
        # Of the folder itself a folder above it may be what cannot be made.
        inside = at is not None and (at.is_relative_to(folder.absolute()) or folder.absolute().is_relative_to(at))
        full = isinstance(error, safetensors.SafetensorError) and os.strerror(errno.ENOSPC) in str(error)
        if not (inside or full):
            raise
        reason = error.strerror if inside else os.strerror(errno.ENOSPC)
        raise OSError(
            f"compile_cache_dir={folder} cannot be written to: {reason}; name a folder that has room for compiled code and converted models"
        ) from error


def use_cache(folder: Path) -> None:
    """Keep Inductor's and Triton's artefacts under `folder`; call before the first compilation."""
    with naming_the_cache(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # Both libraries read these variables only.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")


GraphPass = Callable[[torch.fx.GraphModule], int]


def compile_forward(
    captured: CapturedModel, graph_passes: Sequence[GraphPass] = (), backend: Callable | None = None
) -> Callable[..., torch.Tensor]:
    """One full graph (no breaks) of the forward, rewritten by `graph_passes`, then given to `backend` (Inductor).

    Sizes marked dynamic on the inputs stay symbolic.

    The modules do not change after loading, so no step checks them again: hundreds of guards cost milliseconds.
    """
    compile_graph = backend or compile_fx

    def rewritten(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        for graph_pass in graph_passes:
            graph_pass(module)
        if all(one.device.type == "cpu" for one in inputs if isinstance(one, torch.Tensor)):
            _lower_attention()
        _keep_as_calls(module.graph)
        # Checks of every tensor at each step are a tenth of a small step's Python. Artefacts differ by what was built here.
        built = cpu_int4.built_as() + cpu_decode.built_as()
        with config.patch(size_asserts=False), torch.compiler.config.patch(cache_key_tag=built):
            return compile_graph(module, inputs)

    return Forward(captured, rewritten, options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe})


def _keep_as_calls(graph: torch.fx.Graph) -> None:
    """Tell Inductor that ops it does not know, ours, are calls as they are.

    It finds out by itself, but before that some versions (2.11) write into a log what the op's arguments are computed from,
    which takes exponential time for an op that first stands at the end of a graph.
    """
    for packet in {node.target for node in graph.nodes if isinstance(node.target, OpOverloadPacket)}:
        op = packet.default
        if op not in lowerings and op.namespace == "pagegraph":
            make_fallback(op, tag_to_layout_constraint(get_layout_constraint_tag(op)), warn=False)


@register_lowering(torch.ops.pagegraph.in_memory.default, type_promotion_kind=None)
def _in_memory(x: TensorBox) -> TensorBox:
    copy = lowerings[torch.ops.aten.clone.default](x)
    copy.realize()
    return copy


_int4_row = ExternKernelChoice(cpu_int4.linear_into, name="pagegraph_int4_row", has_out_variant=True)
_int4_rows = fallback_handler(torch.ops.pagegraph.int4_packed_linear.default)


@register_lowering(torch.ops.pagegraph.int4_packed_linear.default, type_promotion_kind=None)
def _int4_packed_linear(x: TensorBox, packed: TensorBox, pairs: TensorBox, group: int) -> TensorBox:
    """One row's product is called past the dispatcher, which takes a quarter as long as the product."""
    inputs = [ExternKernel.require_contiguous(one) for one in (x, packed, pairs)]
    if not cpu_int4.takes(x.get_dtype(), x.get_size()[0]):
        return _int4_rows(*inputs, group)
    layout = FixedLayout(x.get_device(), x.get_dtype(), [1, packed.get_size()[0]])
    return _int4_row.bind(inputs, layout, group=group).output_node()


_int4_chain = ExternKernelChoice(cpu_int4.chain_into, name="pagegraph_int4_chain", has_out_variant=True)


@register_lowering(torch.ops.pagegraph.int4_packed_chain.default, type_promotion_kind=None)
def _int4_packed_chain(
    x: TensorBox, residual: TensorBox, tensors: list[TensorBox], numbers: list[int], eps: list[float]
) -> TensorBox:
    inputs = [ExternKernel.require_contiguous(one) for one in (x, residual, *tensors)]
    layout = FixedLayout(x.get_device(), x.get_dtype(), [1, cpu_int4.chain_size(numbers)])
    alone = len(eps) == 1  # of two places
    return _int4_chain.bind(
        inputs + inputs[2:] * alone, layout, numbers=[*numbers, *[0] * 6 * alone], eps=[*eps, *[0.0] * alone]
    ).output_node()


_attention_of_one_row = ExternKernelChoice(
    cpu_decode.attend_into, name="pagegraph_attention_of_one_row", has_out_variant=True
)


def _attention(op: OpOverload, *arguments: TensorBox | float | int | None) -> TensorBox:
    """One row's on a CPU is called past the dispatcher, which takes longer than the attention."""
    query, key, value, *rest = arguments
    cos, sin, norms = (*rest[:2], rest[2:4]) if len(rest) > 12 else (query, query, [None, None])
    key_cache, value_cache, _, slots, tables, _, lengths, sinks, scale, window, softcap, chunk = rest[-12:]
    tensors = (query, key, value, cos, sin, key_cache, value_cache, slots, tables, lengths)
    row = (
        query.get_device().type == "cpu" and query.get_size()[0] == lengths.get_size()[0] == 1 and norms == [None, None]
    )
    if not row or not cpu_decode.takes_dtypes(query.get_dtype(), key_cache.get_dtype(), sinks, softcap):
        return fallback_handler(op, add_to_fallback_set=False)(*arguments)
    tensors = [ExternKernel.realize_input(one) for one in tensors]
    if any(one.get_stride()[2] != 1 for one in tensors[:3]):
        return fallback_handler(op, add_to_fallback_set=False)(*arguments)
    strides, sizes = [one.get_stride() for one in tensors[:3]], (query.get_size(), value_cache.get_size())
    numbers = cpu_decode.numbers_of(query.get_dtype(), *sizes, strides, 0, window, chunk, True, cos is not query)
    layout = FixedLayout(query.get_device(), query.get_dtype(), [1, sizes[0][1], sizes[1][3]])
    out = _attention_of_one_row.bind(tensors, layout, numbers=numbers, scale=scale).output_node()
    call = out.data.data
    call.mutation_outputs += [MutationOutput(NoneLayout(device=one.get_device()), one, call) for one in tensors[5:7]]
    return out


@cache
def _lower_attention() -> None:
    """From here on by `_attention`; for graphs of a CPU alone, on CUDA the ops stay calls as they are."""
    for op in (torch.ops.pagegraph.paged_attention.default, torch.ops.pagegraph.rope_attention.default):
        add_layout_constraint(op, tag_to_layout_constraint(get_layout_constraint_tag(op)))
        register_lowering(op, type_promotion_kind=None)(partial(_attention, op))


def mark_dynamic(
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    logits_index: torch.Tensor,
) -> None:
    """Tokens, sequences and table width stay symbolic, so one graph serves every step.

    A step of one token is left alone but for the table: size one is always a constant to the compiler.
    Sizes that happen to be equal in the first call are taken for the same symbol: compile on distinct ones.
    """
    if len(token_ids) > 1:
        for tensor in (token_ids, positions, slots, block_tables, query_start, seq_lens, logits_index):
            torch._dynamo.mark_dynamic(tensor, 0)
    torch._dynamo.mark_dynamic(block_tables, 1)


def step_inputs(staged: Staged) -> tuple[torch.Tensor, ...]:
    """The tensors of `CapturedModel.forward`, less the caches."""
    return (
        staged.token_ids,
        staged.positions,
        staged.slots,
        staged.block_tables,
        staged.query_start,
        staged.seq_lens,
        staged.logits_index,
    )


def call(forward: Callable[..., torch.Tensor], staged: Staged, state: DeviceState) -> torch.Tensor:
    """Run a forward, compiled or not, on a staged step -> logits [S, vocab]."""
    return forward(*step_inputs(staged), state.key_caches, state.value_caches)
