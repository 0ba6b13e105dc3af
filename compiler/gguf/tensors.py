"""The tensors of a GGUF file by the names, shapes and order of rows that transformers' modules have.

transformers decides names and the order of rows. It drops tensors silently, so the ones it took are noted here.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from pagegraph.compiler.gguf.file import GgufError, GgufFile


def read_tensors(file: GgufFile, model: nn.Module) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Dequantised weights of `model`, float32, by name; and the names of the file's tensors that they came from.

    A bias that the model has and the file lacks is zero, as llama.cpp's reader takes it. Raises GgufError if the file
    lacks any other weight.
    """
    tensors = load_gguf_checkpoint(file.path, return_tensors=True, model_to_load=model, torch_dtype=torch.float32)[
        "tensors"
    ]
    names = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config={}))
    consumed = {name for name in file.tensors if name in names or name.removesuffix(".weight") in names}
    wanted = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = wanted.keys() - tied - tensors.keys()
    tensors |= {name: torch.zeros(wanted[name].shape) for name in missing if name.endswith(".bias")}
    if missing := sorted(name for name in missing if not name.endswith(".bias")):
        raise GgufError(f"{file.path}: not in the file: {', '.join(missing[:8])} ({len(missing)} weights)")
    for name, tensor in tensors.items():
        if name in wanted and wanted[name].shape != tensor.shape:
            found, described = list(tensor.shape), list(wanted[name].shape)
            raise GgufError(f"{file.path}: {name} has shape {found}, the model that the metadata describes {described}")
    return tensors, consumed
