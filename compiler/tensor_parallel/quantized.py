"""What a rank holds of a quantised weight: rows anywhere, columns at borders of the groups that share a scale.

Knows the one form of every format (`kernels.quant.weight`); reads no checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagegraph.compiler.quantization.methods import QuantizationError
from pagegraph.compiler.tensor_parallel.shards import LARGEST_SIZE, Shard
from pagegraph.kernels.quant.reference import NIBBLE_SPAN
from pagegraph.kernels.quant.weight import QuantWeight


def share_of(weight: QuantWeight, shard: Shard | None, where: str) -> QuantWeight:
    """Of a whole weight, as loaded, what `shard` holds, as tensors of its own; all of it where that is None.

    The shard counts outputs as dimension -2, inputs as -1, whole experts as -3. Raises QuantizationError, which names `where` and
    numbers of ranks that would do, where inputs do not divide at borders of groups, or are in an order of their own.
    """
    if shard is None:
        return weight
    if shard.dim != -1:
        qweight, scale, zero = (None if one is None else _copied(one, shard) for one in weight[:3])
        assert qweight is not None and scale is not None
        return weight._replace(qweight=qweight, scale=scale, zero=zero, out_size=qweight.shape[-2])
    size = weight.in_size
    if weight.g_idx_order is not None:
        raise QuantizationError(
            f"{where}: its inputs are in an order of their own (desc_act or actorder), in which ranks cannot share them; take a"
            " checkpoint that is quantised without, or set tensor_parallel_size=1"
        )
    one_group = weight.group >= size
    unit = (NIBBLE_SPAN if weight.bits == 4 else 1) if one_group else weight.group
    if size % (unit * shard.of):
        works = [str(ranks) for ranks in range(1, LARGEST_SIZE + 1) if size % (unit * ranks) == 0]
        raise QuantizationError(
            f"{where}: {shard.of} ranks cannot share {size} inputs at borders of {'runs' if one_group else 'groups'} of {unit};"
            f" set tensor_parallel_size to one of {', '.join(works) or '1'}"
        )
    qweight = _copied(weight.qweight, shard)
    if one_group:
        scale, zero, group = weight.scale, weight.zero, size // shard.of
    else:
        scale, group = _copied(weight.scale, shard), weight.group
        zero = None if weight.zero is None else _copied(weight.zero, shard)
    return weight._replace(qweight=qweight, scale=scale, zero=zero, group=group)


def _copied(one: Tensor, shard: Shard) -> Tensor:
    return shard.cut(one).clone(memory_format=torch.contiguous_format)
