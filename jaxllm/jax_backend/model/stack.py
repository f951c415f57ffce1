"""How a stack of layers is run: as few scans as possible, in which everything that is not an array stands fixed.

Layers of one stack have weights of one shape but may differ in window and rotary positions, mostly in turn (five with a
window, one without).  A scan over whole turns has them side by side in its body, so that a kernel knows its window when it is
compiled, and compile time grows with the length of a turn, not with the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxllm.families.spec import AttentionSpec


class Stretch(NamedTuple):
    """Layers `start`, `start + 1`, ...: `period` over and over again, `repeats` times."""

    start: int
    period: tuple[AttentionSpec, ...]
    repeats: int

    @property
    def stop(self) -> int:
        """The first layer after it."""
        return self.start + len(self.period) * self.repeats

    def take(self, stack: Any) -> Any:
        """A tree of arrays (L, ...), one for each layer, as (repeats, period, ...), or (repeats, ...) for turns of one layer.

        A scan's body that used a part of what it is handed would keep a copy of it, all weights, for the backward pass.
        """
        return jax.tree.map(self._take, stack)

    def _take(self, leaf: jax.Array) -> jax.Array:
        part = leaf if self.stop - self.start == leaf.shape[0] else leaf[self.start : self.stop]
        return part if len(self.period) == 1 else part.reshape(self.repeats, len(self.period), *leaf.shape[1:])


def stretches(attentions: Sequence[AttentionSpec]) -> tuple[Stretch, ...]:
    """All layers in order, from the front always the repetition that covers most of them, of equals the shortest."""
    found: list[Stretch] = []
    start = 0
    while start < len(attentions):
        rest = tuple(attentions[start:])
        candidates = (Stretch(start, rest[:length], _repeats(rest, length)) for length in range(1, len(rest) // 2 + 1))
        repeated = [stretch for stretch in candidates if stretch.repeats > 1]
        found.append(max(repeated, key=lambda stretch: stretch.stop, default=Stretch(start, rest[:1], 1)))
        start = found[-1].stop
    return tuple(found)


def _repeats(sequence: Sequence[AttentionSpec], length: int) -> int:
    """How often the first `length` come one after another."""
    repeats = 1
    while sequence[repeats * length : (repeats + 1) * length] == sequence[:length]:
        repeats += 1
    return repeats
