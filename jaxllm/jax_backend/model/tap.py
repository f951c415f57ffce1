"""Looking into a forward pass: the points of `jaxllm.probe` as places in the model's own code.

The model passes every such activation through the tap of its context.  The ordinary `Tap` hands it back untouched, so that
it leaves no trace in a compiled program.  A `Recorder` keeps the activation, and adds an offset to it: zero, but the gradient
with respect to it is the activation's cotangent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jaxllm.jax_backend.remat import named

LAYERS = "layers"

# By point; under LAYERS the points of all layers, each with a leading `layers` axis; under another stack's name its points.
Points = dict[str, Any]


class Tap:
    """Lets every activation through, under the name that `jax.remat` knows it by."""

    def __call__(self, point: str, x: jax.Array, /) -> jax.Array:
        """The activation at a point, as the model is to go on with it."""
        return named(x, point)

    def layer_offsets(self) -> Points | None:
        """What the scan over the layers hands to each layer's tap."""
        return None

    def of_layer(self, _offsets: Points | None, /) -> Tap:
        """The tap of one layer, made inside the scan."""
        return self

    def of_stack(self, _name: str, /) -> Tap:
        """The tap of another stack of layers than the one that makes the logits."""
        return self

    def records(self) -> Points | None:
        """Every activation so far, as an output of the function that is being traced."""
        return None

    def keep_layers(self, _records: Points | None, /) -> None:
        """Take what the taps of all layers recorded, stacked by the scan."""


class Recorder(Tap):
    """Records every activation of one forward pass.  offsets: what to add to them; points it lacks are left alone."""

    def __init__(self, offsets: Mapping[str, Any]) -> None:
        self._offsets = offsets
        self._records: Points = {}

    def __call__(self, point: str, x: jax.Array, /) -> jax.Array:
        if point in self._records:
            raise ValueError(f"the model has two points called {point!r}")
        x = x + self._offsets[point] if point in self._offsets else x
        self._records[point] = x
        return x

    def layer_offsets(self) -> Points:
        return dict(self._offsets.get(LAYERS, {}))

    def of_layer(self, offsets: Points | None, /) -> Recorder:
        return Recorder(offsets or {})

    def of_stack(self, name: str, /) -> Recorder:
        stack = Recorder(self._offsets.get(name, {}))
        self._records[name] = stack.records()
        return stack

    def records(self) -> Points:
        return self._records

    def keep_layers(self, records: Points | None, /) -> None:
        self._records[LAYERS] = records


NO_TAP = Tap()
