"""What Inductor makes of the forward: no copy or clone of a cache-sized tensor, and equal results."""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.model.paged import ATTENTION_NAME, wrap_model
from pagegraph.compiler.step.forward import mark_dynamic
from tests.compiler.architectures import tiny_config
from tests.compiler.paged_run import BLOCK, run_paged

pytestmark = pytest.mark.usefixtures("graphs_anew")

PROMPTS = [list(range(3, 40)), list(range(40, 52)), list(range(60, 85))]
SCHEDULE = [[30, 11, 0], [3, 1, 20], [3, 0, 4], [1, 0, 1]]
NUM_BLOCKS = sum(-(-len(prompt) // BLOCK) for prompt in PROMPTS) + 3


def paged_llama():
    model = build_meta(tiny_config("llama", num_hidden_layers=2), torch.float32, ATTENTION_NAME, max_model_len=256)
    paged = wrap_model(model)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(p.shape, generator=generator) * 0.15 for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return paged


def run_compiled(paged, forward):
    """(logits, generated code) of the compiled `forward` over the schedule."""
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True)

    def marked(*inputs):
        mark_dynamic(*inputs[:8])
        return compiled(*inputs)

    with torch.inference_mode():
        return run_and_get_code(run_paged, marked, paged, PROMPTS, SCHEDULE)


def cache_sized_buffers(code: str, layout) -> list[str]:
    """Allocations in the generated code that hold as many elements as one cache, or more."""
    cache = NUM_BLOCKS * BLOCK * layout.num_kv_heads * layout.head_size
    found = []
    for shape in re.findall(r"empty_strided_cpu\(\(([^)]*)\)", code):
        sizes = [part.strip() for part in shape.split(",") if part.strip()]
        if all(size.isdigit() for size in sizes) and torch.Size(map(int, sizes)).numel() >= cache:
            found.append(shape)
    return found


def test_no_cache_sized_copy_after_lowering() -> None:
    paged = paged_llama()
    got, codes = run_compiled(paged, paged)
    assert codes and not any(cache_sized_buffers(code, paged.layouts[0]) for code in codes)
    with torch.inference_mode():
        expected = run_paged(paged, paged, PROMPTS, SCHEDULE)
    for mine, theirs in zip(got, expected):
        for position in theirs:
            torch.testing.assert_close(mine[position], theirs[position], atol=1e-4, rtol=0)


def test_the_check_sees_a_copy() -> None:
    """Negative control: caches that are slices of a larger tensor are copied, and the check says so."""
    paged = paged_llama()

    def sliced(*inputs):
        step, (keys, values, *states) = inputs[:8], inputs[8:]
        copies = [[one[:NUM_BLOCKS].clone() for one in caches] for caches in (keys, values)]
        return paged(*step, *copies, *states)

    _, codes = run_compiled(paged, sliced)
    assert any(cache_sized_buffers(code, paged.layouts[0]) for code in codes)
