"""What Inductor generates on a CPU for ops of ours: C++ functions that are called past PyTorch's dispatcher.

The dispatcher takes longer than the attention of one token. Importing registers the lowerings of the ops that exist on
the CPU alone; `lower_attention` those that on CUDA stay calls of the op. Knows ops and their arguments; knows no
models.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch._inductor.ir import ExternKernel, FixedLayout, MutationOutput, NoneLayout, TensorBox
from torch._inductor.lowering import (
    add_layout_constraint,
    fallback_handler,
    lowerings,
    register_lowering,
    tag_to_layout_constraint,
)
from torch._inductor.select_algorithm import ExternKernelChoice
from torch._library.utils import get_layout_constraint_tag
from torch._ops import OpOverload

import pagegraph.kernels.ops  # noqa: F401  (registers the ops)
from pagegraph.kernels.attention import cpu_decode
from pagegraph.kernels.quant import cpu_int4


@register_lowering(torch.ops.pagegraph.in_memory.default, type_promotion_kind=None)
def _in_memory(x: TensorBox) -> TensorBox:
    copy = lowerings[torch.ops.aten.clone.default](x)
    copy.realize()
    return copy


_int4_row = ExternKernelChoice(cpu_int4.linear_into, name="pagegraph_int4_row", has_out_variant=True)
_int4_rows = fallback_handler(torch.ops.pagegraph.int4_packed_linear.default)


@register_lowering(torch.ops.pagegraph.int4_packed_linear.default, type_promotion_kind=None)
def _int4_packed_linear(x: TensorBox, packed: TensorBox, pairs: TensorBox, group: int) -> TensorBox:
    """One row's GEMV is called past the dispatcher, which takes a quarter as long as the GEMV."""
    inputs = [ExternKernel.require_contiguous(one) for one in (x, packed, pairs)]
    if not cpu_int4.takes(x.get_dtype(), x.get_size()[0]):
        return _int4_rows(*inputs, group)
    layout = FixedLayout(x.get_device(), x.get_dtype(), [1, packed.get_size()[0]])
    return _int4_row.bind(inputs, layout, group=group).output_node()


_int4_layer = ExternKernelChoice(cpu_int4.layer_into, name="pagegraph_int4_layer", has_out_variant=True)


@register_lowering(torch.ops.pagegraph.int4_packed_layer.default, type_promotion_kind=None)
def _int4_packed_layer(
    x: TensorBox, residual: TensorBox, tensors: list[TensorBox], numbers: list[int], eps: list[float]
) -> TensorBox:
    inputs = [ExternKernel.require_contiguous(one) for one in (x, residual, *tensors)]
    layout = FixedLayout(x.get_device(), x.get_dtype(), [1, cpu_int4.layer_size(numbers)])
    alone = len(eps) == 1  # of two places
    return _int4_layer.bind(
        inputs + inputs[2:] * alone, layout, numbers=[*numbers, *[0] * 6 * alone], eps=[*eps, *[0.0] * alone]
    ).output_node()


_attention_of_one_row = ExternKernelChoice(
    cpu_decode.attend_into, name="pagegraph_attention_of_one_row", has_out_variant=True
)


def _attention(op: OpOverload, *arguments: TensorBox | float | int | None, section: int = 0) -> TensorBox:
    """Attention of one row on a CPU is called past the dispatcher, which takes longer than the attention."""
    last = len(op._schema.arguments) - 1
    arguments, section = arguments[:last], max(section, 0, *arguments[last:])  # which comes in either way
    if section:  # one row is to take the code of many
        return fallback_handler(op, add_to_fallback_set=False)(*arguments, section)
    query, key, value, *rest = arguments
    cos, sin, norms = (*rest[:2], rest[2:4]) if len(rest) > 12 else (query, query, [None, None])
    key_cache, value_cache, _, slot_mapping, tables, _, lengths, sinks, scale, window, softcap, chunk = rest[-12:]
    tensors = (query, key, value, cos, sin, key_cache, value_cache, slot_mapping, tables, lengths)
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
def lower_attention() -> None:
    """Lower attention by `_attention` from here on; only for graphs of a CPU, on CUDA the ops stay calls."""
    for op in (torch.ops.pagegraph.paged_attention.default, torch.ops.pagegraph.rope_attention.default):
        add_layout_constraint(op, tag_to_layout_constraint(get_layout_constraint_tag(op)))
        register_lowering(op, type_promotion_kind=None)(partial(_attention, op))
