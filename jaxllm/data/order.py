"""Permutations that are a function of a seed and a purpose alone.

Philox words (Salmon et al., SC 2011) are the same in every version of numpy and on every machine, which `Generator` methods do
not promise.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def _bits(seed: int, purpose: str, count: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=count // 8).digest()
    return int.from_bytes(digest, "little")


def derived_seed(seed: int, purpose: str) -> int:
    """A 32-bit seed that differs for every purpose."""
    return _bits(seed, purpose, 32)


def permutation(size: int, seed: int, purpose: str) -> NDArray[np.int64]:
    """A permutation of 0..size-1."""
    words = np.random.Philox(key=_bits(seed, purpose, 128)).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int64)


def words(seed: int, purpose: str, place: int, count: int) -> NDArray[np.uint64]:
    """`count` random words that belong to one place: a function of seed, purpose and place alone, in any order of places."""
    # A counter stands for four words; the second of its four 64-bit digits keeps places apart.
    return np.random.Philox(key=_bits(seed, purpose, 128), counter=place << 64).random_raw(count)
