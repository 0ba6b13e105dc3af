"""Sections: the keys that attention on CUDA adds up by themselves where a row's bits must not depend on the rest of its step.

A section begins at a multiple of its size, counted from the sequence's first key. Its size follows from how long a sequence
may be, so that it is the same for every step of an engine. Knows sizes alone.
"""

SMALLEST = 256  # keys: a tile is 64
MOST = 32  # sections of the longest sequence


def section_of(max_model_len: int) -> int:
    """Keys of a section, a power of two, for sequences of up to so many tokens."""
    wanted = -(-max_model_len // MOST)
    return max(SMALLEST, 1 << (wanted - 1).bit_length())
