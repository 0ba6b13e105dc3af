"""Every architecture through paged attention against transformers' own eager forward, in float32."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pagegraph.compiler.inductor.compile import compile_forward
from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.model.paged import ATTENTION_NAME, wrap_model
from pagegraph.compiler.model.probe import UnsupportedModel
from pagegraph.compiler.options import PassOptions
from pagegraph.compiler.passes.registry import apply_module_passes
from pagegraph.compiler.step.forward import mark_dynamic
from tests.compiler.architectures import ARCHITECTURES, SIZES, tiny_config
from tests.compiler.model.shared_state import nothing_written
from tests.compiler.paged_run import run_paged

LENGTHS = (37, 12, 25)  # past every window of the configurations
WHOLE = [[37, 12, 25]]
CHUNKED = [[10, 0, 25], [20, 12, 0], [6, 0, 0], [1, 0, 0]]
MIXED = [[30, 11, 0], [3, 1, 20], [3, 0, 4], [1, 0, 1]]


def random_model(config, auto_class: Any = AutoModelForCausalLM) -> torch.nn.Module:
    """transformers' own eager model with weights large enough that every feature shows."""
    torch.manual_seed(0)
    model = auto_class.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.15 * noise)
    return model


def paged_copy(config, stock: torch.nn.Module):
    """The same weights behind paged attention."""
    model = build_meta(config, torch.float32, ATTENTION_NAME, max_model_len=config.max_position_embeddings)
    paged = wrap_model(model)
    model.load_state_dict(stock.state_dict(), assign=True, strict=True)
    if model.config.get_text_config().tie_word_embeddings:
        model.tie_weights()
    return paged


def prompts_for(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in LENGTHS]


@torch.inference_mode()
def check_compiled(
    stock: torch.nn.Module, paged, graph_passes: list, schedule: list[list[int]]
) -> list[torch.fx.GraphModule]:
    """Let Dynamo trace the forward, rewrite it, and compare what it computes with the stock model -> the rewritten
    graphs.
    """
    graphs: list[torch.fx.GraphModule] = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = compile_forward(paged, graph_passes, backend=backend)

    def forward(*inputs):
        mark_dynamic(*inputs[:8])
        return compiled(*inputs)

    prompts = prompts_for(SIZES["vocab_size"])
    expected = stock_logits(stock, prompts)
    with torch.inference_mode():
        got = run_paged(forward, paged, prompts, schedule)
    for sequence, by_position in enumerate(got):
        for position, logits in by_position.items():
            torch.testing.assert_close(logits, expected[sequence][position], atol=1e-4, rtol=0)
    return graphs


def stock_logits(stock: torch.nn.Module, prompts: list[list[int]]) -> list[torch.Tensor]:
    return [stock(input_ids=torch.tensor([p]), use_cache=False).logits[0].float() for p in prompts]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_matches_transformers(name: str) -> None:
    config = tiny_config(name)
    stock = random_model(config)
    paged = paged_copy(tiny_config(name), stock)
    prompts = prompts_for(SIZES["vocab_size"])
    expected = stock_logits(stock, prompts)
    for schedule in (WHOLE, CHUNKED, MIXED):
        with torch.inference_mode():
            got = run_paged(paged, paged, prompts, schedule)
        for sequence, by_position in enumerate(got):
            for position, logits in by_position.items():
                torch.testing.assert_close(logits, expected[sequence][position], atol=1e-4, rtol=0)


def check_head(paged, prompts: list[list[int]], expected: list[torch.Tensor], bound: float) -> None:
    """The head, called on hidden states of all tokens, gives the logits that the stock model has for them."""
    kept = []

    def forward(*inputs):
        kept.append(paged(*inputs)[1])
        return paged(*inputs)

    run_paged(forward, paged, prompts, WHOLE)
    (hidden,) = kept
    size = sum(map(len, prompts))
    torch.testing.assert_close(paged.head(hidden[0, :size]).float(), torch.cat(expected), atol=bound, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_the_head_gives_logits_of_every_token(name: str) -> None:
    """With scales and soft caps, and after passes that rewrote it."""
    config = tiny_config(name)
    stock = random_model(config)
    paged = paged_copy(tiny_config(name), stock)
    prompts = prompts_for(SIZES["vocab_size"])
    expected = stock_logits(stock, prompts)
    apply_module_passes(paged.model, PassOptions())
    check_head(paged, prompts, expected, 1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_forward_writes_to_nothing_that_its_modules_hold(name: str) -> None:
    """With all passes: other threads run the same modules, and the compiler reads them meanwhile."""
    config = tiny_config(name)
    paged = paged_copy(config, random_model(config))
    apply_module_passes(paged.model, PassOptions())
    with nothing_written(paged), torch.inference_mode():
        run_paged(paged, paged, prompts_for(SIZES["vocab_size"]), CHUNKED)


@pytest.mark.parametrize("write", ["attribute", "attribute of an object", "buffer in place", "set and set back"])
def test_a_write_shows(write: str) -> None:
    """Negative control of what the test above looks at."""
    config = tiny_config("llama")
    paged = paged_copy(config, random_model(config))
    norm = paged.model.model.norm
    norm.register_buffer("seen", torch.zeros(1), persistent=False)
    norm.noted, norm.noted_by = None, paged.model.config

    def hook(*_: object) -> None:
        if write == "attribute":
            norm.__dict__["noted"] = 1
        elif write == "attribute of an object":
            norm.noted_by.noted = 1
        elif write == "buffer in place":
            norm.seen += 1
        else:
            norm.noted, norm.noted = 1, None

    norm.register_forward_hook(hook)
    with pytest.raises(AssertionError, match="a forward wrote"), nothing_written(paged), torch.inference_mode():
        run_paged(paged, paged, prompts_for(SIZES["vocab_size"]), WHOLE)


def test_two_threads_run_their_own_batches_through_the_same_modules(impatient_threads: None) -> None:
    config = tiny_config("llama")
    paged = paged_copy(config, random_model(config))
    apply_module_passes(paged.model, PassOptions())
    prompts = prompts_for(SIZES["vocab_size"])
    work = [(prompts, MIXED), (prompts[:1], [[1], [2], [34]])]

    def run(mine: tuple[list, list]) -> list[dict[int, torch.Tensor]]:
        with torch.inference_mode():
            return run_paged(paged, paged, *mine)

    expected = [run(mine) for mine in work]
    with ThreadPoolExecutor(2) as threads:
        for index, got in enumerate(threads.map(run, work * 8)):
            for by_position, theirs in zip(got, expected[index % 2], strict=True):
                torch.testing.assert_close(by_position, theirs)


@pytest.mark.parametrize("name", ["mistral_window", "gemma2", "gemma3", "gpt_oss", "cohere2", "llama3_rope"])
def test_a_wrong_layout_shows(name: str) -> None:
    """Negative control: with window, soft cap, sinks and scale dropped, the comparison fails."""
    config = tiny_config(name)
    stock = random_model(config)
    paged = paged_copy(tiny_config(name), stock)
    paged.layouts = [
        replace(a, scale=a.scale * 1.1, window=0, chunk=0, softcap=0.0, has_sinks=False) for a in paged.layouts
    ]
    prompts = prompts_for(SIZES["vocab_size"])
    expected = stock_logits(stock, prompts)
    with torch.inference_mode():
        got = run_paged(paged, paged, prompts, WHOLE)
    worst = max((logits - expected[s][p]).abs().max().item() for s, by in enumerate(got) for p, logits in by.items())
    assert worst > 1e-2


@pytest.mark.parametrize(
    "name",
    [
        "llama", "gpt2", "deepseek_v3", "llama4",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "qwen3_moe", "hunyuan")),
    ],
)  # fmt: skip
def test_is_one_full_graph(name: str) -> None:
    """Dynamo traces the forward without a break; the graph computes what the modules do."""
    config = tiny_config(name)
    stock = random_model(config)
    paged = paged_copy(tiny_config(name), stock)
    graphs = check_compiled(stock, paged, [], CHUNKED)
    assert len(graphs) == 1
    ops = [n for n in graphs[0].graph.nodes if "paged_attention" in str(n.target)]
    assert len(ops) == config.get_text_config().num_hidden_layers


# Configuration, and what the refusal says.
REFUSED = {
    "bloom": (dict(hidden_size=64, n_layer=2, n_head=4, vocab_size=128), "ALiBi"),
    "mpt": (dict(d_model=64, n_layers=2, n_heads=4, vocab_size=128), "ALiBi"),
    "gptj": (dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, vocab_size=128), "attention interface"),
    "gpt_neo": (
        dict(hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global"], 2]], vocab_size=128),
        "attention interface",
    ),
    "falcon": (
        dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True, vocab_size=128),
        "attention interface",
    ),
    "minimax": (
        dict(SIZES, layer_types=["linear_attention", "full_attention"] * 2, head_dim=16, num_local_experts=4),
        r"2 of 4 layers \(0, 2\) neither attend .* nor keep a state that is known here",
    ),
    "zaya": (
        dict(SIZES, layer_types=["hybrid"] * 4, head_dim=16, num_experts=4, num_experts_per_tok=1),
        "convolves tokens in a way of its own",
    ),
    "diffllama": (SIZES, "layer 0 attends more than once"),
    "doge": (SIZES, "layer 0 makes a mask of its own"),
    "moshi": (SIZES, "layer 0 attends without a mask"),
    "roberta": (dict(SIZES, is_decoder=True), "positions start behind a padding index"),
    "openai-gpt": (dict(n_embd=64, n_layer=2, n_head=4, vocab_size=128), "none of its layers attends through"),
    "deepseek_v32": (dict(num_hidden_layers=2), "type deepseek_sparse_attention attend sparsely"),
    "glm_moe_dsa": (dict(num_hidden_layers=2), "type deepseek_sparse_attention attend sparsely"),
    "deepseek_v4": (dict(num_hidden_layers=4), "type compressed_sparse_attention attend sparsely"),
    "minimax_m3_vl_text": (
        dict(SIZES, layer_types=["full_attention", "minimax_m3_sparse"] * 2),
        "type minimax_m3_sparse attend sparsely",
    ),
    "aria_text": (dict(SIZES, moe_num_experts=4, moe_topk=2), "reads results back"),
    "blip": (dict(text_config=dict(SIZES, projection_dim=64)), "asks for pixel_values, which text does not have"),
    "bert": (dict(SIZES, is_decoder=False), "mask of layer 0 is neither causal"),
    "llama": (
        dict(SIZES, num_key_value_heads=3),
        r"4 attention heads over 3 of keys and values \(num_key_value_heads\)",
    ),
    "phimoe": (
        dict(
            SIZES,
            num_local_experts=4,
            rope_parameters=dict(
                rope_type="longrope",
                short_factor=[1.0] * 8,
                long_factor=[2.0] * 8,
                short_mscale=1.2,
                long_mscale=1.3,
                original_max_position_embeddings=64,
            ),
        ),
        "rope depends on the length .* forward of PhimoeRotaryEmbedding decides",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses_what_paged_attention_does_not_compute(kind: str) -> None:
    sizes, why = REFUSED[kind]
    config = AutoConfig.for_model(kind, **sizes)
    with pytest.raises(UnsupportedModel, match=f"(?s){kind}.*{why}"):
        wrap_model(build_meta(config, torch.bfloat16, ATTENTION_NAME, max_model_len=64))
