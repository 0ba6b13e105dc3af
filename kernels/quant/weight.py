"""A quantised weight: the one type that loader, passes, ops and launchers pass around. Knows no device and no checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["int8", "int4", "fp8", "mxfp4"]
KINDS: dict[torch.dtype, Kind] = {torch.uint8: "int4", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}  # of qweight
E8M0 = torch.uint8  # the dtype of a scale that is 2 ** (byte - 127), of MXFP4 alone


class QuantWeight(NamedTuple):
    """weight [out_size, K] = qweight * scale + zero of the column's group, and the bias of the linear.

    As loaded: qweight int8 or float8_e4m3fn [N, K], or uint8 [N, K / 2] of two 4-bit values each
    (`kernels.quant.reference.pack_nibbles`); scale and zero float32 [N, ceil(K / group)]. MXFP4: the 4-bit values are codes of
    e2m1, and scale is E8M0. Experts of a mixture are [E, N, ..] of all three. As GPUs multiply it: see
    `pagegraph::repacked_linear`. zero is the zero point as a bias, added after scaling: (8 - zero_point) * scale at 4 bits;
    None where all are 0.
    """

    qweight: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None  # [N]
    group: int  # neighbouring columns that share scale and zero
    out_size: int  # N; a layout may fill rows up
    g_idx_order: Tensor | None = None  # int64 [K]: column k meets input g_idx_order[k] (act order); None: input k

    @property
    def kind(self) -> Kind:
        return "mxfp4" if self.scale.dtype == E8M0 else KINDS[self.qweight.dtype]

    @property
    def bits(self) -> int:
        return 4 if self.qweight.dtype == torch.uint8 else 8

    @property
    def in_size(self) -> int:
        """K, of a weight as loaded."""
        return self.qweight.shape[-1] * 8 // self.bits

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantWeight:
        """The same weight with every tensor changed."""
        return QuantWeight(*(change(one) if isinstance(one, Tensor) else one for one in self))


def two_weights(flat: Sequence[Tensor | int | None]) -> tuple[QuantWeight, QuantWeight | None]:
    """The six fields of each of two weights, as an op is given them; None where there is no second one."""
    first, second = flat[:6], flat[6:]
    return QuantWeight(*first), None if second[0] is None else QuantWeight(*second)
