"""Stock transformers on the engine's weights: what the engine is compared with, computed first, kept, and freed.

An unquantised checkpoint is read by transformers itself. Quantised weights are read as the engine reads them, and
dequantised: that compares products, not how the format is read, which the tests do. Attention is transformers' eager one.

In 16 bits the weights are those of the engine's dtype, and what is expected is computed from them in float32; the same
model then runs in its own dtype, which says how far rounding alone goes (`compiler.verify.bands`). One copy of the weights
is held at a time. Knows no engine.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

from pagegraph.compiler.build import LoadedModel
from pagegraph.compiler.model import rope
from pagegraph.compiler.model.checkpoint import sidecar_quantization
from pagegraph.compiler.model.config_json import load_model_config
from pagegraph.compiler.model.experts import leave_experts, take_experts
from pagegraph.compiler.model.left_out import leave_out, left_out_of, towers_if_installed
from pagegraph.compiler.model.meta import auto_class, build_meta
from pagegraph.compiler.model.weights import load_weights
from pagegraph.compiler.options import CompilerOptions
from pagegraph.compiler.quantization.config import Scheme
from pagegraph.compiler.quantization.linear import QuantLinear, QuantModule
from pagegraph.compiler.resolve import resolve_quantization
from pagegraph.compiler.verify.difference import Positions, positions_of
from pagegraph.compiler.verify.layers import ROWS, Key, Outputs, Part, errors, layers_of, watched
from pagegraph.kernels.quant.reference import dequantize

ATTENTION = "eager"  # and how experts are computed
BATCHED = 160  # tokens of a prompt, up to which prompts are generated together


@dataclass(slots=True)
class Expected:
    """Of one prompt."""

    prompt: list[int]
    output: list[int]  # greedy tokens
    logits_file: Path  # float32 [R, vocab] of the last R positions of prompt and output
    own: Positions | None = None  # transformers in the engine's dtype, against these; None in float32

    @property
    def token_ids(self) -> list[int]:
        return self.prompt + self.output

    @property
    def logits(self) -> torch.Tensor:
        return torch.from_numpy(np.load(self.logits_file))

    def logits_at(self, place: int) -> torch.Tensor:
        """Logits [vocab] from which output token `place` is taken."""
        table = np.load(self.logits_file, mmap_mode="r")
        return torch.from_numpy(np.array(table[len(table) - len(self.output) - 1 + place]))

    @property
    def followed(self) -> torch.Tensor:
        """int64 [R]: the token behind each of these positions; behind the last, the likeliest."""
        table = np.load(self.logits_file, mmap_mode="r")
        return torch.tensor([*self.token_ids[len(self.token_ids) - len(table) + 1 :], int(table[-1].argmax())])


@dataclass(slots=True)
class ExpectedLayers:
    """Of one prompt: what each module gave, and how far transformers in the engine's dtype is from it."""

    token_ids: list[int]
    outputs: Outputs
    own: dict[Key, Part] = field(default_factory=dict)


@dataclass(slots=True)
class Reference:
    prompts: list[Expected]
    layers: list[ExpectedLayers]


def scheme_of(options: CompilerOptions, config: PretrainedConfig, folder: Path) -> Scheme | str | None:
    """How the engine's weights are quantised; removes `quantization_config` from `config`."""
    sidecar = None if options.model.load_format == "dummy" else sidecar_quantization(folder)
    return resolve_quantization(options.model.quantization, config, options.device, sidecar)


def is_quantised(options: CompilerOptions, planned: LoadedModel) -> bool:
    """Whether the engine's weights or its KV cache are."""
    config = load_model_config(planned.folder, trust_remote_code=options.model.trust_remote_code)
    return planned.cache_dtype != planned.dtype or scheme_of(options, config, planned.folder) is not None


def stock_model(options: CompilerOptions, planned: LoadedModel) -> Any:
    """Stock transformers without towers, on the options' device, in the engine's dtype; weights that the engine
    quantises, in float32.
    """
    model_options, folder, dtype = options.model, planned.folder, planned.dtype
    config = load_model_config(folder, trust_remote_code=model_options.trust_remote_code)
    scheme, towers = scheme_of(options, config, folder), left_out_of(planned.paged_model.model)
    if scheme is None and model_options.load_format != "dummy":
        with towers_if_installed(config):
            model: Any = auto_class(config).from_pretrained(
                folder, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=model_options.trust_remote_code
            )
        model.eval()
        leave_out(model, towers)
        rope.fix_frequencies(model, planned.max_model_len)
        return model.requires_grad_(False).to(options.device)
    model = build_meta(
        config, dtype, ATTENTION, max_model_len=planned.max_model_len, trust_remote_code=model_options.trust_remote_code
    )
    leave_out(model, towers)
    take_experts(model)  # so that those of them are quantised that the engine has quantised
    load_weights(
        model, folder, device=options.device, dtype=dtype, load_format=model_options.load_format, quantization=scheme,
        progress=False, seed=model_options.seed,
    )  # fmt: skip
    _dequantise(model)
    leave_experts(model, ATTENTION)
    return model


def _dequantise(model: Any) -> None:
    """Put values in float32 where quantised ones are. None are held here: each is to go when its values are there."""
    for path in [path for path, one in model.named_modules() if isinstance(one, QuantModule)]:
        held: Any = model.get_submodule(path)
        parent, _, name = path.rpartition(".")
        if isinstance(held, QuantLinear):
            held.dtype = torch.float32
            values = held.dequantized()
            plain = nn.Linear(held.in_features, held.out_features, bias=False, device="meta")
            plain.register_parameter("bias", held.bias)
            model.set_submodule(path, plain)
            owner, name = plain, "weight"
        else:  # experts of a layer
            owner = model.get_submodule(parent)
            values = dequantize(held.qweight, held.scale, held.zero, held.group)
            values = values.transpose(1, 2).contiguous() if owner.experts_form.transposed else values
            delattr(owner, name)
        del held
        parameter: Any = nn.Parameter(values, requires_grad=False)
        parameter.was_quantised = True  # `in_float32` asks
        owner.register_parameter(name, parameter)


@contextmanager
def in_float32(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """While within, `model` computes in float32; afterwards in `dtype`, but for what was in float32 by the model's will."""
    tensors = [one for one in (*model.parameters(), *model.buffers()) if one.is_floating_point()]
    before = [dtype if hasattr(one, "was_quantised") else one.dtype for one in tensors]
    for one in tensors:
        one.data = one.data.float()
    yield
    for one, kept in zip(tensors, before):
        one.data = one.data.to(kept)


@torch.inference_mode()
def compute_reference(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    dtype: torch.dtype,
    num_tokens: int,
    last: int,
    layered: Sequence[int],
    folder: Path,
) -> Reference:
    """What is expected of an engine in `dtype`: `num_tokens` greedy tokens of each prompt, logits of the `last` positions,
    and of the prompts `layered` what each module gives. Logits are written to `folder`.
    """
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, pad_token_id=0)
    with in_float32(model, dtype):
        expected = []
        for index, (prompt, output) in enumerate(zip(prompts, _outputs(model, prompts))):
            one = Expected(prompt, output, folder / f"{index}.npy")
            logits = _logits(model, one.token_ids, last)
            if logits[-len(output) - 1 : -1].argmax(-1).tolist() != output:  # padding did something to it
                one.output = _generated(model, [prompt])[0]
                logits = _logits(model, one.token_ids, last)
            np.save(one.logits_file, logits.numpy())
            expected.append(one)
        layers = [_layers(model, expected[index].prompt) for index in layered]
    if dtype != torch.float32:
        for one in expected:
            one.own = positions_of(one.logits, _logits(model, one.token_ids, last), one.followed)
        paths = layers_of(model)
        for layer in layers:
            again = _layers(model, layer.token_ids, layer.outputs.whole)
            layer.own = errors(layer.outputs, again.outputs, paths)
            layer.outputs.whole = {path: whole.to(dtype) for path, whole in layer.outputs.whole.items()}
    return Reference(expected, layers)


def _outputs(model: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Greedy tokens of each prompt. Short ones are generated together, padded on the left."""
    short = [at for at, prompt in enumerate(prompts) if len(prompt) <= BATCHED]
    found = dict(zip(short, _generated(model, [prompts[at] for at in short]))) if short else {}
    return [found[at] if at in found else _generated(model, [prompt])[0] for at, prompt in enumerate(prompts)]


def _generated(model: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    real = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return model.generate(ids, attention_mask=torch.tensor(real, device=model.device))[:, longest:].tolist()


def _logits(model: Any, token_ids: list[int], last: int) -> torch.Tensor:
    """Float32 [R, vocab], on the CPU."""
    ids = torch.tensor([token_ids], device=model.device)
    return model(input_ids=ids, use_cache=False, logits_to_keep=last).logits[0, -last:].float().cpu()


def _layers(model: Any, token_ids: list[int], inputs: dict[str, torch.Tensor] | None = None) -> ExpectedLayers:
    ids = torch.tensor([token_ids], device=model.device)
    with watched(model, len(token_ids), inputs) as outputs:
        model(input_ids=ids, use_cache=False, logits_to_keep=ROWS)
    outputs.whole = {path: whole.cpu() for path, whole in outputs.whole.items()}
    return ExpectedLayers(token_ids, outputs)


def free(device: torch.device) -> None:
    """Give back what a model that nobody refers to held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
