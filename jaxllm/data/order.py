"""Permutations that are a function of a seed and a purpose alone.

Philox words (Salmon et al., SC 2011) are the same in every version of numpy and on every machine, which `Generator` methods do
not promise.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray

_SHORTEST = 16  # bits of the smallest block
_ROUNDS = 4
_PART = 2**14  # places worked out at once


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


def shuffled(places: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Which of `size` rows stands at each place of an endless run of epochs, every one a permutation of its own.

    Place p is row p mod size of epoch p // size; the answer is a row, 0..size-1.  The permutation is that of Grain's
    `MapDataset.shuffle` (four rounds of the Simon cipher, Beaulieu et al., 2013, walked until it falls below `size`: Black and
    Rogaway, CT-RSA 2002), worked out for many places at once.  Where Grain's block is one bit too small to be a permutation
    (2^16 + 1 rows, 2^18 + 1, ...), ours is two bits larger.
    """
    epochs, rows = np.divmod(places, size)
    parts = epochs << 48 | rows // _PART
    found = np.empty_like(rows)
    for part in np.unique(parts):
        here = parts == part
        epoch, number = divmod(int(part), 1 << 48)
        found[here] = _part(size, (seed + epoch) % 2**32, number)[rows[here] % _PART]
    return found


@functools.lru_cache(maxsize=8)
def _part(size: int, seed: int, number: int) -> NDArray[np.int64]:
    """The rows at _PART neighbouring places of an epoch: numpy's cost is in the call, not in the number."""
    places = np.arange(number * _PART, min((number + 1) * _PART, size), dtype=np.int64)
    bits = max((size - 1).bit_length(), _SHORTEST)
    bits += bits % 2
    return _walk(places, size, bits, seed) if size > 2**_SHORTEST else _leap(places, size, bits, seed)


def _walk(places: NDArray[np.int64], size: int, bits: int, seed: int) -> NDArray[np.int64]:
    found = _simon(places, bits, seed)
    while (outside := found >= size).any():
        found[outside] = _simon(found[outside], bits, seed)
    return found


def _leap(places: NDArray[np.int64], size: int, bits: int, seed: int) -> NDArray[np.int64]:
    """`_walk` where rows are few in their block and walks long."""
    # Every number below `size` stays where it is and the others take a step; squared, that map takes two steps, then four.
    block = np.arange(1 << bits, dtype=np.int64)
    cipher = _simon(block, bits, seed)
    step, ends = np.where(block < size, block, cipher), cipher[places]
    while (step[ends] >= size).any():
        step = step[step]
    return step[ends]


def _simon(values: NDArray[np.int64], bits: int, seed: int) -> NDArray[np.int64]:
    """A permutation of the numbers of `bits` bits: a Feistel network over two halves."""
    half, mask = bits // 2, (1 << bits // 2) - 1
    left, right = values >> half, values & mask

    def mixed(word: NDArray[np.int64]) -> NDArray[np.int64]:
        def rotated(by: int) -> NDArray[np.int64]:
            return ((word << by) | (word >> (half - by))) & mask

        return (rotated(1) & rotated(8)) ^ rotated(2)

    keys = _seed_sequence(seed)
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = left ^ mixed(right) ^ (first & mask)
        right = right ^ mixed(left) ^ (second & mask)
    return (left << half) | right


def _seed_sequence(seed: int) -> list[int]:
    """Four words of C++'s `std::seed_seq{seed}` (ISO C++ 14882, rand.util.seedseq): the keys of the rounds."""
    word, keys = 2**32, [0x8B8B8B8B] * _ROUNDS

    def stirred(value: int) -> int:
        return value ^ (value >> 27)

    for place in range(_ROUNDS):
        here, before, after, opposite = (place + offset & 3 for offset in (0, -1, 1, 2))
        first = 1664525 * stirred(keys[here] ^ keys[after] ^ keys[before]) % word
        second = (first + (1, 1 + seed, 2, 3)[place]) % word
        keys[after], keys[opposite], keys[here] = (keys[after] + first) % word, (keys[opposite] + second) % word, second
    for place in range(_ROUNDS):
        here, before, after, opposite = (place + offset & 3 for offset in (0, -1, 1, 2))
        first = 1566083941 * stirred((keys[here] + keys[after] + keys[before]) % word) % word
        second = (first - place) % word
        keys[after], keys[opposite], keys[here] = keys[after] ^ first, keys[opposite] ^ second, second
    return keys
