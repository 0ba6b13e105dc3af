"""Quantised weights of a mixture's experts in the tensor cores' layout, as kernels are given them. Knows no kernel and no model."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pagegraph.kernels.quant.reference import REPACK_BLOCK
from pagegraph.kernels.quant.weight import QuantWeight


class QuantStack(NamedTuple):
    """Weights [E, rows, size], each as `pagegraph::repacked_linear` has it, with rows filled up to whole blocks of 64.

    qweight [E, rows / 64, size / 64, 128 or 256, 16] of integers or of codes of e2m1, [E, rows, size'] of e4m3; scale and zero
    [E, rows / 64, ..] or [E, rows, ..]; E8M0 scales stay bytes.
    """

    qweight: Tensor
    scale: Tensor
    zero: Tensor | None
    group: int
    rows: int
    size: int

    @property
    def height(self) -> int:
        """Rows with those that fill the last block up."""
        return -(-self.rows // REPACK_BLOCK) * REPACK_BLOCK

    @property
    def tall(self) -> QuantWeight:
        """All experts below each other: one weight [E * height, size]."""
        parts = [None if one is None else one.flatten(0, 1) for one in (self.qweight, self.scale, self.zero)]
        return QuantWeight(*parts, None, self.group, len(self.qweight) * self.height)  # type: ignore[arg-type]

    @property
    def has_e4m3_rows(self) -> bool:
        """Whether values are e4m3 with one scale a row and nothing else."""
        return self.tall.kind == "fp8" and self.group >= self.size and self.zero is None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, scales and zeros, or scales again where there are none."""
        return self.qweight, self.scale, self.scale if self.zero is None else self.zero

    @property
    def constants(self) -> dict[str, int | str | bool]:
        """What kernels are compiled for."""
        kind, has_zero = self.tall.kind, self.zero is not None
        return {
            "EXPERTS": len(self.qweight), "HEIGHT": self.height, "K": self.size, "GROUP": self.group,
            "GROUPS": 1 if kind == "fp8" else self.scale.shape[4] // 2, "KIND": kind,
            "WHOLE": has_zero or kind == "mxfp4" or self.group < self.size, "HAS_ZERO": has_zero,
        }  # fmt: skip
