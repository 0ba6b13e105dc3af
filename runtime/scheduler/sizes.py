"""Sizes of a scheduler that fit together: a sequence of any allowed length can run to its end. Knows numbers alone."""

from __future__ import annotations

from pagegraph.runtime.scheduler.block_pool import BlockPool


def check_sizes(
    pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, enable_chunked_prefill: bool
) -> None:
    """Raise ValueError for sizes under which some sequence could never run."""
    capacity = pool.capacity
    if max_model_len > capacity:
        raise ValueError(
            f"max_model_len {max_model_len} exceeds the KV cache of {pool.num_blocks - 1} blocks x {pool.block_size} "
            f"tokens = {capacity}; set max_model_len to at most {capacity} or raise num_blocks or kv_cache_memory"
        )
    if max_num_seqs > max_num_batched_tokens:
        raise ValueError(
            f"max_num_seqs {max_num_seqs} exceeds max_num_batched_tokens {max_num_batched_tokens}: a step could not "
            f"hold one token of each; set max_num_seqs to at most {max_num_batched_tokens}"
        )
    if not enable_chunked_prefill and max_num_batched_tokens < max_model_len:
        raise ValueError(
            f"max_num_batched_tokens {max_num_batched_tokens} is below max_model_len {max_model_len} with "
            f"enable_chunked_prefill off; set it to at least {max_model_len}, or turn chunked prefill on"
        )
