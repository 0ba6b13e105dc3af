"""A mixture's experts become one op: what a module of them computes is read off the module, routing stays the model's.

transformers hands the experts of most mixtures to a function registered by name, as it does with attention. Ours calls
`pagegraph::experts`. What stands between the two products is found by trying: the module's own gate is run on numbers and compared
with what the op can do. A module that does something else goes to transformers' grouped products. Experts that do not ask for a function (Llama 4's) run as their module does. Quantised experts stand as modules where
their parameters stood, and are computed by the op alone. Knows no model by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.compiler.model.forward_local import forward_local
from pagegraph.compiler.quantization.layouts import RepackedExperts
from pagegraph.compiler.quantization.linear import QuantModule
from pagegraph.kernels.moe.form import ACTIVATIONS, Form
from pagegraph.kernels.moe.reference import between

EXPERTS_NAME = "pagegraph"
# Attributes that transformers gives to modules of experts that ask for a function.
ASKING = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' signature: hidden_states [T, H], chosen experts and their weights [T, k] -> [T, H]."""
    form: Form | None = getattr(module, "experts_form", None)
    if first := getattr(
        module, "first_expert", 0
    ):  # of a rank that holds whole experts: numbers of others are left out
        top_k_index = top_k_index - first
    if form is None:
        if first:
            top_k_index = torch.where(top_k_index < 0, module.num_experts, top_k_index)
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    batch = forward_local.paged
    routed, query_start = (hidden_states, top_k_index, top_k_weights), None if batch is None else batch.query_start
    biases = [getattr(module, f"{name}_bias") if module.has_bias else None for name in weight_names(form)]
    up, down = (getattr(module, name) for name in weight_names(form))
    if not isinstance(module.down_proj, QuantModule):
        return torch.ops.pagegraph.experts(*routed, up, biases[0], down, biases[1], query_start, *form)
    weights = [(one.qweight, one.scale, one.zero, one.group, bias) for one, bias in zip((up, down), biases)]
    as_loaded = form._replace(transposed=False)
    if isinstance(down, RepackedExperts):
        return torch.ops.pagegraph.repacked_experts(
            *routed,
            *weights[0],
            *weights[1],
            down.in_features,
            query_start,
            *as_loaded,
            quantize_x=up.quantize_x and down.quantize_x,
        )
    return torch.ops.pagegraph.quant_experts(*routed, *weights[0], *weights[1], query_start, *as_loaded)


ExpertsInterface.register(EXPERTS_NAME, experts_forward)


def take_experts(model: nn.Module) -> int:
    """Let the op compute those experts of `model` that it can -> how many modules of them."""
    taken = 0
    for module in model.modules():
        if all(hasattr(module, name) for name in ASKING) and (form := form_of(module)) is not None:
            module.experts_form = form
            module.config._experts_implementation = EXPERTS_NAME
            taken += 1
    return taken


def weight_names(form: Form) -> tuple[str, str]:
    """The parameters of both products."""
    return "gate_up_proj" if form.gated else "up_proj", "down_proj"


def leave_experts(model: nn.Module, implementation: str) -> None:
    """Undo `take_experts`: one of transformers' own implementations computes them."""
    for module in model.modules():
        if getattr(module, "experts_form", None) is not None:
            module.experts_form = None
            module.config._experts_implementation = implementation


class StackedSize(NamedTuple):
    """A stacked parameter: experts, rows and columns of each, and whether it holds columns of rows."""

    experts: int
    rows: int
    columns: int
    transposed: bool


def quantizable(model: nn.Module) -> dict[str, StackedSize]:
    """Parameters of experts that may be quantised, by name; those of a layer follow each other."""
    found = {}
    for path, module in model.named_modules():
        form: Form | None = getattr(module, "experts_form", None)
        if form is None:
            continue
        for name in weight_names(form):
            experts, *size = getattr(module, name).shape
            rows, columns = reversed(size) if form.transposed else size
            found[f"{path}.{name}"] = StackedSize(experts, rows, columns, form.transposed)
    return found


def form_of(module: nn.Module) -> Form | None:
    """What a module that asks for a function computes between its products; None: not what the op can do."""
    limits = [float(value) for name in ("limit", "swiglu_limit") if (value := getattr(module, name, None))]
    alphas = [float(value) for name in ("alpha", "swiglu_alpha") if (value := getattr(module, name, None))]
    sample = _sample(2 * max([10.0, *limits]))
    try:
        with torch.no_grad(), torch.device("cpu"):
            wanted = module._apply_gate(sample.clone()) if module.has_gate else module.act_fn(sample.clone())
    except Exception:  # whatever code of another's raises that cannot do without weights
        return None
    if wanted.is_meta:
        return None
    for form in _forms(module, limits, alphas):
        computed = between(sample, form)
        if computed.shape == wanted.shape and torch.allclose(computed, wanted, rtol=1e-5, atol=1e-6):
            return form
    return None


def _sample(largest: float) -> torch.Tensor:
    """float32 [64, 128] from -largest to largest, in no order."""
    numbers = torch.linspace(-largest, largest, 64 * 128, device="cpu")
    return numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0), device="cpu")].view(64, 128)


def _forms(module: nn.Module, limits: list[float], alphas: list[float]) -> Iterator[Form]:
    """All that the op could be told for this module, the plainest first."""
    gated, interleaved = module.has_gate, module.has_gate and not module.is_concatenated
    for activation in ACTIVATIONS:
        for alpha in (1.0, *alphas) if activation == "silu" else (1.0,):
            for limit in (0.0, *limits):
                for shift in (0.0, 1.0):
                    yield Form(activation, alpha, limit, shift, gated, interleaved, module.is_transposed)
