"""Capture sizes: which padded shape, or bucket, a step of T tokens and S sequences runs in.

Pure arithmetic. Sizes of one are padded to two, because the compiler would specialise on a one. On CUDA each
capture size is one graph; on the CPU, and beyond the largest, a step otherwise keeps its own size. On the CPU a
single token has a compiled forward of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from pagegraph.kernels.linear.fixed_rows import padded

MAX_CAPTURED_TOKENS = 16384  # a larger step runs without a graph


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A padded step: `tokens` rows of the model, `seqs` sequences; decode when they are equal.

    A decode may run `num_steps` times, each time a token further: a draft graph.
    """

    tokens: int
    seqs: int
    num_steps: int = 1


@dataclass(frozen=True, slots=True)
class CaptureSizes:
    """Captured sizes in rising order. `decode`: steps of one token a sequence; `mixed`: token counts.

    `max_decode_tokens`: of a step in which every sequence decodes; as many sequences as any bucket has.
    """

    decode: tuple[int, ...]
    mixed: tuple[int, ...]
    max_decode_tokens: int

    def buckets(self) -> list[Bucket]:
        """All buckets, smallest first: the order of capture."""
        buckets = [Bucket(n, n) for n in self.decode]
        buckets += [Bucket(n, min(n, self.max_decode_tokens)) for n in self.mixed]
        return sorted(set(buckets))

    def first(self) -> list[Bucket]:
        """The few buckets that steps of every size fit in without much padding: captured before anything runs."""
        decode, mixed = _every_fourth(self.decode), _every_fourth(self.mixed)
        return [
            bucket
            for bucket in self.buckets()
            if bucket in CaptureSizes(decode, mixed, self.max_decode_tokens).buckets()
        ]

    def bucket(self, num_tokens: int, num_seqs: int) -> Bucket | None:
        """Smallest bucket that holds the step, or None when it is larger than every bucket."""
        if num_tokens == num_seqs:
            at = bisect_left(self.decode, num_tokens)
            if at < len(self.decode):
                return Bucket(self.decode[at], self.decode[at])
        at = bisect_left(self.mixed, num_tokens)
        if at < len(self.mixed):
            return Bucket(self.mixed[at], min(self.mixed[at], self.max_decode_tokens))
        return None


def _every_fourth(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The largest of rising sizes, then each that is at most a quarter of the one kept before."""
    kept: list[int] = []
    for size in reversed(sizes):
        if not kept or size * 4 <= kept[-1]:
            kept.append(size)
    return tuple(reversed(kept))


def cuda_capture_sizes(max_decode_tokens: int, max_tokens: int) -> CaptureSizes:
    """Capture sizes for every step of at most `max_tokens`.

    Decode sizes are 2, 4, then by 8 to 256 and by 32 to `max_decode_tokens`.
    """
    max_decode_tokens = max(max_decode_tokens, 2)
    decode = sorted(
        {n for n in (2, 4, *range(8, 257, 8), *range(288, max_decode_tokens + 1, 32)) if n < max_decode_tokens}
        | {max_decode_tokens}
    )
    return CaptureSizes(tuple(decode), tuple(_mixed(max_tokens)), max_decode_tokens)


def _mixed(limit: int) -> list[int]:
    """16, 32, 48, by 64 to 1024, by 256 to 4096, from there on eight to an octave, and the limit itself.

    Padding of a mixed step costs GEMM time: sizes are close where steps are many. A prompt's own steps are mostly the
    limit.
    """
    sizes, size = [16, 32, 48, *range(64, 1024, 64)], 1024
    while size < limit:
        sizes.append(size)
        size += max(256, 1 << (size.bit_length() - 4))
    return [*(n for n in sizes if n < limit), limit]


def own_bucket(num_tokens: int, num_seqs: int, deterministic: bool = False) -> Bucket:
    """The step's own size, at least two of each unless it is a single token of a single sequence.

    deterministic: one compiled forward for all sizes, with tokens padded to what products take.
    """
    if deterministic:
        return Bucket(padded(num_tokens), max(num_seqs, 2))
    if num_tokens == 1:
        return Bucket(1, 1)
    return Bucket(num_tokens, max(num_seqs, 2))
