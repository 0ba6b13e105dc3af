"""Quantised weights of a mixture's experts, put together expert by expert on their device. Knows no checkpoints and no models."""

from __future__ import annotations

import torch

from pagegraph.compiler.quantization.methods import QuantizationError
from pagegraph.kernels.quant.weight import QuantWeight


class Stack:
    """A weight [E, N, K] of so many experts and rows, of which `put` fills rows of one expert at a time."""

    def __init__(self, experts: int, rows: int, device: torch.device) -> None:
        self._size, self._device = (experts, rows), device
        self._weight: QuantWeight | None = None

    def put(self, expert: int, rows: slice, part: QuantWeight, where: str) -> None:
        """Raises QuantizationError where the part is quantised in another way than those before it."""
        if part.g_idx_order is not None:
            raise QuantizationError(
                f"{where}: experts whose inputs are in an order of their own (desc_act or actorder) are not served; take a"
                " checkpoint that is quantised without"
            )
        held = self._weight or self._empty(part)
        if (part.kind, part.group) != (held.kind, held.group) or part.out_size != rows.stop - rows.start:
            raise QuantizationError(
                f"{where}: {part.out_size} rows of {part.kind} in groups of {part.group}, where another expert of the layer has"
                f" {held.kind} in groups of {held.group} and this one {rows.stop - rows.start} rows; experts of one kind are served"
            )
        if part.zero is not None and held.zero is None:
            held = held._replace(zero=torch.zeros_like(held.scale))
        for whole, one in zip(held[:3], part[:3]):
            if whole is not None:
                whole[expert, rows] = 0 if one is None else one
        self._weight = held

    def weight(self) -> QuantWeight:
        """What was put."""
        assert self._weight is not None
        return self._weight

    def _empty(self, part: QuantWeight) -> QuantWeight:
        """Room for all experts; a zero is made when one comes."""

        def room(one: torch.Tensor) -> torch.Tensor:
            return torch.empty(*self._size, *one.shape[1:], dtype=one.dtype, device=self._device)

        return QuantWeight(room(part.qweight), room(part.scale), None, None, part.group, self._size[1])
