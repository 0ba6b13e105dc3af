"""Capture sizes: every step fits the bucket it gets, and no smaller one would do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pagegraph.compiler.step.capture_sizes import Bucket, cuda_capture_sizes, own_bucket


@given(st.integers(1, 1024), st.integers(16, 4096), st.data())
def test_smallest_rung_that_holds_the_step(max_seqs: int, max_tokens: int, data: st.DataObject) -> None:
    sizes = cuda_capture_sizes(max_seqs, max_tokens)
    seqs = data.draw(st.integers(1, max_seqs))
    tokens = data.draw(st.integers(seqs, max(seqs, max_tokens)))
    bucket = sizes.bucket(tokens, seqs)
    if bucket is None:
        assert tokens > sizes.mixed[-1]
        return
    assert bucket in sizes.buckets()
    assert bucket.tokens >= tokens and bucket.seqs >= seqs
    kind = sizes.decode if tokens == seqs else sizes.mixed
    assert not any(tokens <= size < bucket.tokens for size in kind)


def test_decode_padding_is_bounded() -> None:
    sizes = cuda_capture_sizes(1024, 2048)
    for seqs in range(8, 1025):
        assert sizes.bucket(seqs, seqs).tokens - seqs < (8 if seqs <= 256 else 32)


def test_mixed_padding_is_bounded() -> None:
    sizes = cuda_capture_sizes(256, 2048)
    for tokens in range(64, 2049):
        assert sizes.bucket(tokens, 3).tokens - tokens < (64 if tokens <= 960 else 256)
    sizes = cuda_capture_sizes(256, 16384)
    for tokens in range(2048, 16385):
        assert sizes.bucket(tokens, 3).tokens - tokens < max(256, tokens / 8)


@given(st.integers(16, 20000))
def test_the_largest_step_fits_a_rung_exactly(max_tokens: int) -> None:
    assert cuda_capture_sizes(8, max_tokens).bucket(max_tokens, 8) == Bucket(max_tokens, 8)


def test_a_full_batch_of_any_limit_has_a_bucket() -> None:
    for limit in (1, 2, 3, 7, 100, 250, 257, 1000):
        assert cuda_capture_sizes(limit, 64).bucket(limit, limit) == Bucket(max(limit, 2), max(limit, 2))


def test_cpu_pads_ones_only() -> None:
    assert own_bucket(1, 1) == Bucket(1, 1)
    assert own_bucket(40, 1) == Bucket(40, 2)
    assert own_bucket(40, 5) == Bucket(40, 5)


@given(st.integers(1, 1024), st.integers(16, 4096), st.data())
def test_the_first_rungs_hold_what_all_hold(max_seqs: int, max_tokens: int, data: st.DataObject) -> None:
    """And a decode pads to less than about four times its size, the price of a quick start."""
    sizes = cuda_capture_sizes(max_seqs, max_tokens)
    first = sizes.first()
    assert set(first) <= set(sizes.buckets()) and len(first) <= 15
    seqs = data.draw(st.integers(1, max_seqs))
    tokens = data.draw(st.integers(seqs, max(seqs, max_tokens)))
    if sizes.bucket(tokens, seqs) is None:
        return
    holding = [bucket for bucket in first if bucket.tokens >= tokens and bucket.seqs >= seqs]
    assert holding
    assert tokens > seqs or min(holding).tokens <= max(4 * seqs + 32, 8)
