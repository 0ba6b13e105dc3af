"""A configuration in the compiler's own words: which device it comes to, and what its keys say of models, steps and
passes.
"""

from __future__ import annotations

from dataclasses import fields

import torch

from pagegraph.compiler.options import CompilerOptions, KvCacheOptions, ModelOptions, PassOptions, StepOptions
from pagegraph.compiler.resolve import resolve_device
from pagegraph.compiler.step.state import NgramRange
from pagegraph.compiler.tensor_parallel.shards import Ranks
from pagegraph.runtime.config import Config

GROUP = "ranks"  # of the processes that share a model


def compiler_options(
    config: Config, device: torch.device | None = None, capability: tuple[int, int] | None = None, rank: int = 0
) -> CompilerOptions:
    """Raises ValueError where there is no such device, ConfigError where its token budget is below `max_num_seqs`.

    rank: of the configuration's tensor_parallel_size; each has a GPU of its own. device: instead of the configuration's, and it need not be
    there; capability: of a GPU that is not.
    """
    if device is None:
        device = resolve_device(config.device)
        if config.tensor_parallel_size > 1 and device.type == "cuda":
            each = config.tensor_parallel_size // config.nnodes
            device = _of_rank(rank % each, each)
    num_threads = config.num_threads
    processes = config.tensor_parallel_size * config.data_parallel_size // config.nnodes  # of this machine
    if processes > 1 and num_threads is None:
        num_threads = max(torch.get_num_threads() // processes, 1)
    return CompilerOptions(
        model=model_options(config),
        draft=None if config.draft is None else model_options(config.draft),
        device=device,
        capability=capability,
        kv_cache=KvCacheOptions(
            block_size=config.block_size,
            num_blocks=config.num_blocks,
            memory=config.cpu_kv_cache_memory() if device.type == "cpu" else config.kv_cache_memory,
            gpu_memory_utilization=config.gpu_memory_utilization,
            dtype=config.kv_cache_dtype,
            state_memory=config.state_memory(device.type) if config.enable_prefix_caching else 0,
        ),
        step=StepOptions(
            max_num_seqs=config.max_num_seqs,
            max_decode_tokens=config.max_decode_tokens,
            max_num_batched_tokens=config.batched_tokens(device.type),
            max_draft_tokens=config.max_draft_tokens,
            ngram=NgramRange(config.prompt_lookup_min, config.prompt_lookup_max) if config.proposes_on_device else None,
        ),
        passes=pass_options(config),
        compile=bool(config.compile),
        num_threads=num_threads,
        ranks=Ranks(rank, config.tensor_parallel_size, GROUP, config.expert_parallel),
        cache_dir=config.compile_cache_dir,
    )


def _of_rank(rank: int, size: int) -> torch.device:
    """The GPU of one of so many ranks of a machine, in the order that CUDA shows. Raises ValueError where there are fewer."""
    there = torch.cuda.device_count()
    if there < size:
        raise ValueError(
            f"tensor_parallel_size={size} wants a GPU for each rank, and torch sees {there} here; set it to {there} or less, or"
            " device to cpu"
        )
    return torch.device("cuda", rank)


def model_options(config: Config) -> ModelOptions:
    """Of the configuration's own model; keys and options have the same names."""
    return ModelOptions(**{field.name: getattr(config, field.name) for field in fields(ModelOptions)})


def pass_options(config: Config) -> PassOptions:
    """Keys and options have the same names."""
    return PassOptions(**{field.name: getattr(config, field.name) for field in fields(PassOptions)})
