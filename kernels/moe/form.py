"""What the experts of one layer compute between their two products, and how their weights lie. Knows no device."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


class Form(NamedTuple):
    """The last arguments of `pagegraph::experts`, see `kernels.ops`.

    Gated: activation(gate) * (up + shift), else activation(up). limit > 0 caps gate and up first, gate from above, up on
    both sides. silu is x * sigmoid(alpha * x); alpha is 1 for all others. interleaved: columns of gate and up in turn
    rather than one half each. transposed: weights are [E, in, out] rather than [E, out, in].
    """

    activation: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0
    shift: float = 0.0
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False

    @property
    def constants(self) -> dict[str, str | float | bool]:
        """The same as arguments of a kernel, which has them in capitals."""
        return {name.upper(): value for name, value in self._asdict().items()}
