"""Checkpoints of random weights as they are published, so that loading is measured too: an expert's matrices one by one, or those of
GPT-OSS all stacked in MXFP4 (blocks uint8 [E, N, K / 32, 16], scales uint8 [E, N, K / 32]).

Names and sizes are those of transformers' model on the meta device. Knows safetensors; knows no engine.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from perf.floors import MODELS, write_model

SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"
MEMORY = Path("/dev/shm")  # where it has room, disks do not count
STACK = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)$")
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
QUANTIZED = {"gpt_oss": MXFP4}  # by model_type, as published
SCALES = (118, 126)  # of MXFP4: powers of two whose exponents are these less 127


def write_checkpoint(model: str, device: str) -> Path:
    """A folder with the model's configuration and weights, written once. Raises RuntimeError where there is no room."""
    config, places = MODELS[model], [one for one in (MEMORY, Path(tempfile.gettempdir())) if one.exists()]
    for place in places:
        if (folder := place / f"pagegraph-checkpoint-{model}").joinpath(INDEX).exists():  # written behind all else
            return folder
    with torch.device("meta"):
        named = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=getattr(torch, str(config["dtype"]))
        )
    sizes = {name: (tuple(one.shape), one.dtype) for name, one in named.state_dict().items()}
    num_bytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in sizes.values())
    place = next((one for one in places if shutil.disk_usage(one).free > 1.2 * num_bytes), None)
    if place is None:
        raise RuntimeError(f"no room for {num_bytes / 2**30:.0f} GiB in {' or '.join(map(str, places))}")
    folder = write_model(model, place / f"pagegraph-checkpoint-{model}")
    if method := QUANTIZED.get(str(config["model_type"])):
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    shard: dict[str, Tensor] = {}
    places_of: dict[str, str] = {}  # of each tensor, the file

    def write() -> None:
        file = f"model-{len(set(places_of.values())) + 1:05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        places_of.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in _published(sizes, method is not None, device):
        shard[name] = tensor.cpu()
        if sum(one.nbytes for one in shard.values()) > SHARD_BYTES:
            write()
    if shard:
        write()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places_of}))
    return folder


def _published(
    sizes: dict[str, tuple[tuple[int, ...], torch.dtype]], quantized: bool, device: str
) -> Iterator[tuple[str, Tensor]]:
    for name, (shape, dtype) in sizes.items():
        stack = STACK.match(name)
        if stack is None:
            yield name, _normal(shape, dtype, device)
        elif quantized:  # as transformers holds it: [E, K, N]
            experts, size, columns = shape
            blocks = torch.randint(256, (experts, columns, size // 32, 16), dtype=torch.uint8, device=device)
            yield f"{name}_blocks", blocks
            yield f"{name}_scales", torch.randint(*SCALES, blocks.shape[:-1], dtype=torch.uint8, device=device)
        else:
            parts = ("gate_proj", "up_proj") if stack[2] == "gate_up_proj" else ("down_proj",)
            for expert in range(shape[0]):
                for part, rows in zip(parts, _normal(shape[1:], dtype, device).chunk(len(parts))):
                    yield f"{stack[1]}{expert}.{part}.weight", rows.contiguous()


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    if len(shape) < 2:
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=shape[-1] ** -0.5)
