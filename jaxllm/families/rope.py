"""Rotary position embedding (arXiv:2104.09864) and the ways in which it is stretched to longer sequences, as data.

The frequencies are computed on the host, once for each shape, with the roundings of transformers' `modeling_rope_utils`.

Shape legend: R rotated dimensions of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Frequencies = NDArray[np.floating[Any]]


class Scaling(Protocol):
    """A way to stretch rotary positions.  attention_factor: what cosine and sine are multiplied by."""

    @property
    def attention_factor(self) -> float:
        """What cosine and sine are multiplied by."""
        ...

    def frequencies(self, theta: float, dimensions: int, length: int, dtype: np.dtype) -> Frequencies:
        """(R/2,) angles per position for a sequence of `length` tokens."""
        ...


@dataclass(frozen=True)
class Linear:
    """Positions are divided by `factor` (arXiv:2306.15595)."""

    factor: float
    attention_factor: float = 1.0

    def frequencies(self, theta: float, dimensions: int, length: int, dtype: np.dtype) -> Frequencies:  # noqa: ARG002
        """As `Scaling`."""
        return np.asarray(_unscaled(theta, dimensions, dtype) / np.asarray(self.factor, dtype))


@dataclass(frozen=True)
class DynamicNtk:
    """theta grows with the sequence beyond `original_positions` (arXiv:2309.00071, section 3.3)."""

    factor: float
    original_positions: int
    attention_factor: float = 1.0

    def frequencies(self, theta: float, dimensions: int, length: int, dtype: np.dtype) -> Frequencies:
        """As `Scaling`."""
        stretch = self.factor * max(length, self.original_positions) / self.original_positions - (self.factor - 1)
        return _unscaled(theta * stretch ** (dimensions / (dimensions - 2)), dimensions, dtype)


@dataclass(frozen=True)
class Llama3:
    """Long wavelengths are divided by `factor`, short ones stay, those between are blended (arXiv:2407.21783)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int
    attention_factor: float = 1.0

    def frequencies(self, theta: float, dimensions: int, length: int, dtype: np.dtype) -> Frequencies:  # noqa: ARG002
        """As `Scaling`."""
        plain = _unscaled(theta, dimensions, dtype)
        low, high, positions = self.low_frequency_factor, self.high_frequency_factor, self.original_positions
        wavelength = 2 * math.pi / plain
        divided = np.where(wavelength > positions / low, plain / self.factor, plain)
        smooth = (positions / wavelength - low) / (high - low)
        blended = (1 - smooth) * divided / self.factor + smooth * divided
        between = (wavelength >= positions / high) & (wavelength <= positions / low)
        return np.asarray(np.where(between, blended, divided), dtype)


@dataclass(frozen=True)
class Yarn:
    """Frequencies that turn more than `beta_fast` times stay, below `beta_slow` they are divided (arXiv:2309.00071)."""

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool

    def frequencies(self, theta: float, dimensions: int, length: int, dtype: np.dtype) -> Frequencies:  # noqa: ARG002
        """As `Scaling`."""
        powers = _powers(theta, dimensions, dtype)
        low, high = (self._dimension(turns, theta, dimensions) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dimensions - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(dimensions // 2).astype(dtype) - low) / (high - low), 0, 1)
        kept = 1 - ramp
        return np.asarray(1.0 / (self.factor * powers) * (1 - kept) + 1.0 / powers * kept, dtype)

    def _dimension(self, turns: float, theta: float, dimensions: int) -> float:
        """The dimension whose frequency turns that often within the original positions."""
        return dimensions * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True)
class LongRope:
    """Each frequency has a factor of its own, `long` in sequences beyond `original_positions` (arXiv:2402.13753)."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_positions: int
    attention_factor: float

    def frequencies(self, theta: float, dimensions: int, length: int, dtype: np.dtype) -> Frequencies:
        """As `Scaling`."""
        factors = np.asarray(self.long if length > self.original_positions else self.short, dtype)
        return np.asarray(1.0 / (factors * _powers(theta, dimensions, dtype)), dtype)


@dataclass(frozen=True)
class RopeSpec:
    """Half-split layout: of the R rotated dimensions, i pairs with i + R / 2.  fraction: of a head that is rotated."""

    theta: float
    scaling: Linear | DynamicNtk | Llama3 | Yarn | LongRope | None = None
    fraction: float = 1.0

    @property
    def attention_factor(self) -> float:
        """What cosine and sine are multiplied by."""
        return 1.0 if self.scaling is None else self.scaling.attention_factor

    def rotated(self, head_dim: int) -> int:
        """R, the number of dimensions of a head that are rotated, the first ones."""
        return int(head_dim * self.fraction)


def inverse_frequencies(spec: RopeSpec, head_dim: int, length: int, dtype: np.dtype) -> Frequencies:
    """(R/2,) angles per position, in `dtype`.

    length: tokens in a row, documents packed into it or not.  transformers looks at the largest position of whatever batch it
    is given; of a whole row that is the same number, and it depends neither on micro-batches nor on processes.
    """
    dimensions = spec.rotated(head_dim)
    if spec.scaling is None:
        return _unscaled(spec.theta, dimensions, dtype)
    return spec.scaling.frequencies(spec.theta, dimensions, length, dtype)


def _unscaled(theta: float, dimensions: int, dtype: np.dtype) -> Frequencies:
    return np.asarray(np.asarray(1.0, dtype) / _powers(theta, dimensions, dtype))


def _powers(theta: float, dimensions: int, dtype: np.dtype) -> Frequencies:
    """theta^(2i/R).

    Every operation is rounded to `dtype` once, also the power, which float32 library functions round differently: an error
    of one unit in the last place grows with the position.
    """
    exponents = np.arange(0, dimensions, 2).astype(dtype) / np.asarray(dimensions, dtype)
    return np.asarray(np.power(np.float64(theta), exponents.astype(np.float64)).astype(dtype))
