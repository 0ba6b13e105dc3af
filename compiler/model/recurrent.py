"""Layers with recurrent state become ops over pools of states: delta rules and state space models, and their convolutions.

transformers computes such a layer by functions of its model file, which kernels may replace by name; ours call the ops
`pagegraph::causal_conv`, `gated_delta` and `selective_scan` while a forward of this engine runs, and transformers' own
functions else. Which layer it is, the stand-in cache has said. What is left around a recurrence, products element by
element, is the compiler's. Knows functions by name and no model.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.compiler.model.forward_local import forward_local

SILU = ("silu", "swish")


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Sizes of what a layer keeps for each slot, as probed; see `kernels.ops`."""

    layer: int
    conv: tuple[int, int]  # (rows, channels), in the dtype of activations
    recurrent: tuple[int, ...]  # three sizes, float32; () where it only convolves
    inputs: int = 0  # numbers of a token that the recurrence takes up

    def nbytes(self, dtype: torch.dtype) -> int:
        """Of a slot; dtype: of activations."""
        return math.prod(self.conv) * dtype.itemsize + (4 * math.prod(self.recurrent) if self.recurrent else 0)

    def draft_nbytes(self, dtype: torch.dtype) -> int:
        """Of what is put aside of a draft token; dtype: of activations."""
        return self.conv[1] * dtype.itemsize + (4 * self.inputs if self.recurrent else 0)


class Recurrence(Protocol):
    """What computes one layer; arguments as those of the ops, without states and whose rows they are."""

    def causal_conv(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool
    ) -> torch.Tensor: ...

    def gated_delta(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        normalize: bool,
    ) -> torch.Tensor: ...

    def selective_scan(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        dt_softplus: bool,
        dt_min: float | None = None,
        dt_max: float | None = None,
    ) -> torch.Tensor: ...


@dataclass(slots=True)
class PooledRecurrence:
    """A layer over its pools, for the sequences of one step; see `kernels.ops` for shapes and dtypes."""

    conv_states: torch.Tensor
    recurrent_states: torch.Tensor | None
    slots: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    # Of a step that may hold draft tokens; None: it does not
    conv_drafts: torch.Tensor | None = None
    recurrent_drafts: torch.Tensor | None = None
    state_lens: torch.Tensor | None = None

    def causal_conv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool) -> torch.Tensor:
        given = x, weight, bias, self.conv_states, self.slots, self.query_start, self.seq_lens, silu
        return torch.ops.pagegraph.causal_conv(*given, *self._drafts(self.conv_drafts))

    def gated_delta(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        normalize: bool,
    ) -> torch.Tensor:
        given = query, key, value, decay, beta, self.recurrent_states
        step = self.slots, self.query_start, self.seq_lens, normalize
        return torch.ops.pagegraph.gated_delta(*given, *step, *self._drafts(self.recurrent_drafts))

    def selective_scan(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        dt_softplus: bool,
        dt_min: float | None = None,
        dt_max: float | None = None,
    ) -> torch.Tensor:
        given = x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, False, self.recurrent_states
        step = self.slots, self.query_start, self.seq_lens
        return torch.ops.pagegraph.selective_scan(*given, *step, *self._drafts(self.recurrent_drafts))

    def _drafts(self, rows: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return () if rows is None else (rows, self.state_lens)


class InPool:
    """Given back where transformers expects a layer's new state: it is in its pool already."""

    def to(self, *_: Any) -> InPool:
        return self


IN_POOL = InPool()


def _causal_conv(
    layer: Recurrence, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
    activation: str | None = None, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """x [1, C, T], weight [C, K] -> [1, C, T]."""
    silu = activation in SILU
    out = layer.causal_conv(x[0].T, weight, bias, silu)
    return (out if silu or activation is None else ACT2FN[activation](out)).T[None]


def _delta_rule(
    layer: Recurrence, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False, **_: Any,
) -> tuple[torch.Tensor, InPool]:  # fmt: skip
    """query, key, value [1, T, H, *], g [1, T, H] or [1, T, H, D], beta [1, T, H]."""
    out = layer.gated_delta(query[0], key[0], value[0], g[0], beta[0], use_qk_l2norm_in_kernel)
    return out[None], IN_POOL


def _heads_scan(
    layer: Recurrence, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    chunk_size: int, D: torch.Tensor | None = None, dt_bias: torch.Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")), **_: Any,
) -> tuple[torch.Tensor, InPool]:  # fmt: skip
    """Of Mamba 2: x [1, T, H, P], dt [1, T, H], A and D [H], B and C [1, T, G, N]."""
    limits = [None if math.isinf(one) else one for one in dt_limit]
    out = layer.selective_scan(x[0], dt[0], A, B[0], C[0], D, dt_bias, dt_softplus, *limits)
    return out[None], IN_POOL


def _channels_scan(
    layer: Recurrence, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    D: torch.Tensor | None = None, z: torch.Tensor | None = None, delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False, **_: Any,
) -> tuple[torch.Tensor, InPool]:  # fmt: skip
    """Of Mamba 1: x, dt and z [1, I, T], A [I, N], D [I], B and C [1, N, T]."""
    channels = x[0].T
    given = channels[..., None], dt[0].T, A, B[0].T[:, None], C[0].T[:, None], D, delta_bias, delta_softplus
    out = layer.selective_scan(*given)[..., 0]
    if z is not None:
        out = out * functional.silu(z[0].T)
    return out.T[None].to(x.dtype), IN_POOL


# A function of a model file -> what stands for it in our forwards.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _causal_conv,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _heads_scan,
    "mamba_selective_scan": _channels_scan,
}


def take_recurrence(model: nn.Module) -> bool:
    """Let the ops compute recurrent layers of `model` in our forwards -> whether its files have functions for such layers."""
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    found = [(file, name) for file in files for name in FUNCTIONS if hasattr(file, name)]
    for file, name in found:
        if not hasattr(original := getattr(file, name), "instead_of"):
            setattr(file, name, _in_our_forwards(FUNCTIONS[name], original))
    return bool(found)


def _in_our_forwards(ours: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        layer = forward_local.recurrence
        return original(*args, **kwargs) if layer is None else ours(layer, *args, **kwargs)

    call.instead_of = original  # type: ignore[attr-defined]
    return call
