"""One GGUF file becomes a model folder: weights as safetensors, configuration, tokenizer and generation defaults.

transformers reads the file; its `from_pretrained` would also want accelerate and build the whole model.
Knows the order of the parts; what each part means is known by the other files of this folder.

Every key and tensor of a file is applied or refused: transformers' reader drops some without a word (rope scaling,
head sizes, biases, second ends of a sequence), so what nobody took is an error, and rotary angles of the built model
are compared with the file's. A conversion is named by the file's whole content.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from pagegraph.compiler.gguf.blocks import keep
from pagegraph.compiler.gguf.config import check_model, configuration, generation_config
from pagegraph.compiler.gguf.file import open_gguf, read_once
from pagegraph.compiler.gguf.tensors import read_tensors
from pagegraph.compiler.gguf.tokenizer import save_tokenizer
from pagegraph.compiler.model.files import write_json
from pagegraph.compiler.model.meta import build_meta


@read_once()
def convert(path: Path, folder: Path, keep_quantized: bool) -> None:
    """Write the weights, the configuration and the tokenizer of the GGUF file at `path` into `folder`, which is made.

    Weights are dequantised to float32, but for linears with `keep_quantized` (bfloat16 then, as they are served).
    Raises GgufError where the file cannot be converted.
    """
    file = open_gguf(path)
    config = configuration(file)
    folder.mkdir(parents=True)
    config.eos_token_id = save_tokenizer(file, folder).endings
    model = build_meta(config, torch.float32, "eager", max_model_len=config.max_position_embeddings)
    tensors, consumed = read_tensors(file, model)
    check_model(file, model, consumed)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if keep_quantized:
        config.quantization_config = keep(path, model, tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items() if name not in tied},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config.architectures = [type(model).__name__]
    # What `dtype: auto` means for it: the file's values come from few bits, float32 would serve no one.
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    write_json(folder / "generation_config.json", generation_config(file, config))
