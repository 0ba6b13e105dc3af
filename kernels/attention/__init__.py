"""Attention over a paged KV cache: reference, CPU and Triton, and what writes keys and values."""
