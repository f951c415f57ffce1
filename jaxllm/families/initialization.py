"""Counter-based initial weights: any slice of any parameter is the same on every backend, mesh and host.

Element i of a parameter (C order, Hugging Face layout) is a function of (seed, parameter name, i) alone: word i of a Philox
4x64 stream (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by seed and name, turned into a
normal deviate by the inverse normal distribution function in float64, then rounded once to float32.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_WORDS_PER_COUNTER = 4
# Elements computed at once: their float64 intermediates stay in a cache, and malloc keeps little for each thread.
_CHUNK = 1 << 16
_THREADS = 8


@dataclass(frozen=True)
class Initializer:
    """`normal` with standard deviation `std`, `zeros` or `ones`; `zero_row`: a padding token's row that starts at zero."""

    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0
    zero_row: int | None = None


def _key(seed: int, name: str) -> int:
    """128 bits from seed and name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")


def _normal(seed: int, name: str, start: int, stop: int, std: float) -> NDArray[np.float32]:
    """Elements [start, stop) of the parameter's flat stream."""
    from scipy.special import ndtri

    values = np.empty(stop - start, np.float32)
    key = _key(seed, name)

    def fill(begin: int) -> None:
        end = min(begin + _CHUNK, stop)
        first = begin // _WORDS_PER_COUNTER
        generator = np.random.Philox(key=key, counter=first)
        words = generator.random_raw(end - first * _WORDS_PER_COUNTER)[begin - first * _WORDS_PER_COUNTER :]
        uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        values[begin - start : end - start] = ndtri(uniform) * std

    chunks = range(start, stop, _CHUNK)
    if len(chunks) < 2:
        for begin in chunks:
            fill(begin)
    else:
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1, len(chunks))) as pool:
            list(pool.map(fill, chunks))
    return values


def initial_values(
    init: Initializer, seed: int, name: str, shape: Sequence[int], index: Sequence[slice] | None = None
) -> NDArray[np.float32]:
    """Initial values of a parameter, or of the slice `index` of it (one contiguous slice per axis).

    name and shape are the Hugging Face ones.  Returns float32 in C order.  Only the rows of the first axis that the slice
    needs are generated.
    """
    bounds = [s.indices(n)[:2] for s, n in zip(index or [slice(None)] * len(shape), shape, strict=True)]
    sliced = tuple(stop - start for start, stop in bounds)
    if init.kind != "normal":
        return np.full(sliced, 1.0 if init.kind == "ones" else 0.0, dtype=np.float32)
    row = math.prod(shape[1:])
    first, last = bounds[0]
    values = _normal(seed, name, first * row, last * row, init.std).reshape(last - first, *shape[1:])
    if init.zero_row is not None and first <= init.zero_row < last:
        values[init.zero_row - first] = 0.0
    return values[(slice(None), *(slice(*bound) for bound in bounds[1:]))]
