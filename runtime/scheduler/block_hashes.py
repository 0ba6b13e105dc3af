"""What full blocks of tokens are known by in a prefix cache: chained, keyed hashes (blake2b, 16 bytes).

The engine's block pool finds blocks by them, and a web process that chooses among engines computes them of a prompt to see
which of the engines has most of it. Knows no blocks, no tensors and no engines.
"""

from __future__ import annotations

import hashlib
import secrets

KEY_BYTES = 32
TOKEN_BYTES = 4  # int32 in the machine's own order


def new_key() -> bytes:
    """A key that nobody can predict: hashes cannot be predicted either, so nobody can aim for a collision."""
    return secrets.token_bytes(KEY_BYTES)


class BlockHashes:
    """Of blocks of `block_size` tokens. Who has the same `key` has the same hashes."""

    def __init__(self, block_size: int, key: bytes) -> None:
        self.block_size = block_size
        self._key = key

    def root(self, salt: str = "") -> bytes:
        """Parent of a sequence's first block; a `salt` separates whoever must not share blocks."""
        return self._digest(salt.encode())

    def chain(self, parent: bytes, tokens: bytes) -> list[bytes]:
        """Hashes of full blocks of int32 token ids, the first of which follows the block, or root, of hash `parent`."""
        size = TOKEN_BYTES * self.block_size
        hashes = []
        for at in range(0, len(tokens), size):
            parent = self._digest(parent + tokens[at : at + size])
            hashes.append(parent)
        return hashes

    def _digest(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, key=self._key, digest_size=16).digest()
