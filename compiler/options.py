"""Options of the compiler: models, memory of the KV cache, sizes of steps, passes.

Plain values that the caller has checked; knows no configuration file and no command line.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagegraph.compiler.step.state import NgramRange
from pagegraph.compiler.tensor_parallel.shards import ALONE, Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """A model and the form in which its weights are loaded; words such as `auto` are those of `compiler.resolve`."""

    model: str  # a folder, a GGUF file or a name of the Hugging Face hub
    gguf_file: str | None = None
    revision: str | None = None
    tokenizer: str | None = None  # folder of its tokenizer where that is another
    trust_remote_code: bool = False
    dtype: str = "auto"
    load_format: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None  # tokens; None: the model's own
    seed: int = 0  # of random weights


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheOptions:
    """Blocks of the KV cache: so many, or as many as fit in `memory` bytes, or in a share of the GPU's memory."""

    block_size: int = 16  # tokens
    num_blocks: int | None = None
    memory: int | None = None
    gpu_memory_utilization: float = 0.9
    dtype: str = "auto"
    state_memory: int = 256 << 20  # bytes of kept recurrent states, where layers have such


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """The largest step, and how many tokens are drafted."""

    max_num_seqs: int
    max_decode_tokens: int  # sequences and draft tokens of a step
    max_num_batched_tokens: int
    max_draft_tokens: int = 0  # of a sequence and step
    ngram: NgramRange | None = None  # where the device drafts by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class PassOptions:
    """Which passes run; each is named as in `compiler.passes.registry`."""

    merge_linears: bool = True
    skinny_linears: bool = True
    rotary_once: bool = True
    fuse_rope: bool = True
    fuse_rows: bool = True
    fuse_linears: bool = True
    fuse_routers: bool = True
    fuse_states: bool = True
    round_activations: bool = True
    deterministic: bool = False  # a token's bits do not depend on the rest of its step; other passes may give way


@dataclass(frozen=True, slots=True, kw_only=True)
class CompilerOptions:
    """All options of a build."""

    model: ModelOptions
    draft: ModelOptions | None = None  # the draft model, over the same blocks
    device: torch.device
    kv_cache: KvCacheOptions
    step: StepOptions
    passes: PassOptions = PassOptions()
    compile: bool = True
    num_threads: int | None = None  # of the CPU; None: PyTorch's choice
    capability: tuple[int, int] | None = None  # of a GPU that is not in this machine
    ranks: Ranks = ALONE  # that share the model
    cache_dir: str | None = None  # of compiled code and converted models; None: `compiler.inductor.cache.DEFAULT_CACHE`
