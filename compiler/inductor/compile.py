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

from collections.abc import Callable, Sequence

import torch
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
from torch._library.utils import get_layout_constraint_tag
from torch._ops import OpOverloadPacket

from pagegraph.compiler.inductor.cpu_lowerings import lower_attention
from pagegraph.compiler.inductor.guard_free import Forward
from pagegraph.compiler.model.paged import Forwarded, PagedModel
from pagegraph.kernels.attention import cpu_decode
from pagegraph.kernels.quant import cpu_int4

GraphPass = Callable[[torch.fx.GraphModule], int]


def compile_forward(
    paged_model: PagedModel, graph_passes: Sequence[GraphPass] = (), backend: Callable | None = None
) -> Callable[..., Forwarded]:
    """One full graph (no breaks) of the forward, rewritten by `graph_passes`, then given to `backend` (Inductor).

    Sizes marked dynamic on the inputs stay symbolic.

    Guards on modules are dropped, because modules do not change after loading: hundreds of them cost milliseconds.
    """
    compile_graph = backend or compile_fx

    def rewritten(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        for graph_pass in graph_passes:
            graph_pass(module)
        if all(one.device.type == "cpu" for one in inputs if isinstance(one, torch.Tensor)):
            lower_attention()
        _keep_as_calls(module.graph)
        # Size assertions at each step are a tenth of a small step's Python. The cache key names the C++ that was built.
        built = cpu_int4.built_as() + cpu_decode.built_as()
        with config.patch(size_asserts=False), torch.compiler.config.patch(cache_key_tag=built):
            return compile_graph(module, inputs)

    return Forward(
        paged_model, rewritten, options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    )


def _keep_as_calls(graph: torch.fx.Graph) -> None:
    """Tell Inductor that our ops, which it does not know, stay calls.

    It would find out by itself, but before that some versions (2.11) log what the op's arguments are computed from,
    which takes exponential time for an op that first stands at the end of a graph.
    """
    for packet in {node.target for node in graph.nodes if isinstance(node.target, OpOverloadPacket)}:
        op = packet.default
        if op not in lowerings and op.namespace == "pagegraph":
            make_fallback(op, tag_to_layout_constraint(get_layout_constraint_tag(op)), warn=False)
