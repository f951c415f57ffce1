"""Where the points of `jaxllm.probe` lie among the modules of a family's transformers model, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["input", "output", "query", "key", "value"]


@dataclass(frozen=True)
class ModulePoint:
    """One tensor of a transformers model.

    module: its dotted name, with `{layer}` where there is one per layer.  side: what goes into the module, what comes out of
    it, or, for an attention module, the query, key or value that it hands to the attention function (position-encoded).
    """

    module: str
    side: Side = "output"

    def of_layer(self, layer: int) -> ModulePoint:
        """The point in one layer."""
        return ModulePoint(self.module.format(layer=layer), self.side)
