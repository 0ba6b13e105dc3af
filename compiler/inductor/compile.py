"""One full graph of the forward, traced by Dynamo, rewritten by the passes and compiled by Inductor.

Knows how graphs are handed to Inductor; knows nothing of steps, buckets or which sizes are dynamic.

The whole forward is one graph, not one layer compiled for all: ops span the border of layers (a layer's last linear
shares kernels with the next one's first), and rotary angles are computed once. That costs about 20 s of a cold start.
On CUDA all sizes are symbolic, so one compilation serves every capture size; a forward with constant sizes for single
tokens doubled the start and gained nothing once rotation was fused. On a CPU it is faster and stays. Merged or viewed
KV caches were rejected: functionalization clones views, so each layer's K and V enter the graph as whole tensors that
the op declares as mutated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable
from torch._ops import OpOverloadPacket

from pagegraph.compiler.inductor.guard_free import Forward, NotStorable
from pagegraph.compiler.model.paged import PagedModel
from pagegraph.kernels.attention import cpu_decode
from pagegraph.kernels.quant import cpu_int4

GraphPass = Callable[[torch.fx.GraphModule], int]
Took = Callable[[str, float], None]  # told the name of a part of the compilation, and its seconds


def untold(part: str, seconds: float) -> None:
    """Nobody wants to know."""


# The compiled graph keeps what it is made of, so that `save_graph` can store it; also where PyTorch finds no key for it.
STORABLE = {"bundled_autograd_cache": True, "bypass_autograd_cache_key": True, "force_autograd_cache": True}


def compile_forward(
    paged_model: PagedModel,
    graph_passes: Sequence[GraphPass] = (),
    backend: Callable | None = None,
    took: Took = untold,
) -> Forward:
    """One full graph (no breaks) of the forward, rewritten by `graph_passes`, then given to `backend` (Inductor).

    Sizes marked dynamic on the inputs stay symbolic.

    Guards on modules are dropped, because modules do not change after loading: hundreds of them cost milliseconds.
    """

    def rewritten(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        # Imported by those that compile: a start that finds its forward stored need not wait a second for them.
        from torch._functorch import config as functorch_config
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        from pagegraph.compiler.inductor.cpu_lowerings import lower_attention

        compile_graph = backend or compile_fx
        start = time.perf_counter()
        for graph_pass in graph_passes:
            graph_pass(module)
        if all(one.device.type == "cpu" for one in inputs if isinstance(one, torch.Tensor)):
            lower_attention()
        _keep_as_calls(module.graph)
        rewrote = time.perf_counter()
        # Size assertions at each step are a tenth of a small step's Python. The cache key names the C++ that was built.
        tagged = torch.compiler.config.patch(cache_key_tag=built_cpp())
        with config.patch(size_asserts=False), functorch_config.patch(STORABLE), tagged:
            compiled = compile_graph(module, inputs)
        took("graph passes", rewrote - start)
        took("Inductor", time.perf_counter() - rewrote)
        return compiled

    return Forward(
        paged_model, rewritten, options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    )


def built_cpp() -> str:
    """Which C++ functions graphs compiled now call past PyTorch."""
    return cpu_int4.built_as() + cpu_decode.built_as()


def save_graph(compiled: Callable) -> bytes:
    """A graph that `compile_forward` has compiled, as bytes. Raises NotStorable where it depends on this process."""
    if getattr(compiled, "serialize", None) is None:
        raise NotStorable("PyTorch does not serialise the compiled graph")
    return BundledAOTAutogradSerializableCallable.serialize_compile_artifacts(
        BundledAOTAutogradSerializableCallable(compiled)
    )


def load_graph(code: bytes) -> Callable:
    """The inverse of `save_graph`: a pickle, so only for bytes that this user has written."""
    return BundledAOTAutogradSerializableCallable.deserialize_compile_artifacts(code).compiled_fn


def _keep_as_calls(graph: torch.fx.Graph) -> None:
    """Tell Inductor that our ops, which it does not know, stay calls.

    It would find out by itself, but before that some versions (2.11) log what the op's arguments are computed from,
    which takes exponential time for an op that first stands at the end of a graph.
    """
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    for packet in {node.target for node in graph.nodes if isinstance(node.target, OpOverloadPacket)}:
        op = packet.default
        if op not in lowerings and op.namespace == "pagegraph":
            make_fallback(op, tag_to_layout_constraint(get_layout_constraint_tag(op)), warn=False)
