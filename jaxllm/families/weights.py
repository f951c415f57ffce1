"""WeightRule: how one Hugging Face tensor and its place in the Flax model are the same numbers.

A rule is one line: the Hugging Face name, the Flax path(s), and an einops pattern read from left (Hugging Face) to right
(Flax), for example

    model.layers.{layer}.self_attn.q_proj.weight -> layers.attention.query.kernel
    "(heads head_dim) embed -> embed heads head_dim"

Patterns only rearrange, never compute, so that one rule moves weights, gradients and Adam moments in both directions.  The
axis names on the right are the logical axes that `jaxllm.jax_backend` maps to the mesh.  A name with `{layer}` stands for one
Hugging Face tensor per layer and one Flax tensor with a leading `layers` axis.  Several paths mean that the first axis on the
right is split, one index per path (GPT-2's fused query, key and value).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import einops
import numpy as np
from numpy.typing import NDArray

from jaxllm.families.initialization import Initializer

Array = NDArray[np.generic]
WeightKind = Literal["kernel", "embedding", "norm", "bias"]


def _groups(side: str) -> list[list[str]]:
    """`"(heads head_dim) embed"` -> `[["heads", "head_dim"], ["embed"]]`."""
    groups: list[list[str]] = []
    inside = False
    for token in side.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            groups.append([])
            inside = True
        elif token == ")":
            inside = False
        elif inside:
            groups[-1].append(token)
        else:
            groups.append([token])
    return groups


@dataclass(frozen=True)
class WeightRule:
    """One weight of a model (of every layer, if the name holds `{layer}`).

    name: Hugging Face name.  paths: Flax paths, dotted.  pattern: einops pattern, Hugging Face -> Flax.  kind decides weight
    decay.  init draws the initial values in Hugging Face layout.  sizes: length of every axis in the pattern.  layers: number
    of layers of a stacked weight, None for a weight that stands alone.  aliases: other Hugging Face names of the same tensor
    (a tied output head), which a checkpoint may hold but never needs.
    """

    name: str
    paths: tuple[str, ...]
    pattern: str
    kind: WeightKind
    init: Initializer
    sizes: Mapping[str, int] = field(repr=False)
    layers: int | None = None
    aliases: tuple[str, ...] = ()

    @cached_property
    def _sides(self) -> tuple[list[list[str]], list[list[str]]]:
        left, right = self.pattern.split("->")
        return _groups(left), _groups(right)

    @cached_property
    def _pattern_sizes(self) -> dict[str, int]:
        return {axis: self.sizes[axis] for group in self._sides[0] for axis in group}

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Hugging Face shape of one layer's tensor."""
        return tuple(math.prod(self.sizes[axis] for axis in group) for group in self._sides[0])

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Logical axes of each Flax tensor, `layers` first when stacked; the split axis is not among them."""
        axes = tuple(group[0] for group in self._sides[1])
        axes = axes[1:] if len(self.paths) > 1 else axes
        return ("layers", *axes) if self.layers is not None else axes

    @cached_property
    def flax_shape(self) -> tuple[int, ...]:
        """Shape of each Flax tensor, all layers stacked."""
        return tuple(self.layers or 0 if axis == "layers" else self.sizes[axis] for axis in self.axes)

    @property
    def parameters(self) -> int:
        """Number of elements over all layers."""
        return math.prod(self.shape) * (self.layers or 1)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: two or more dimensions in Hugging Face layout, and neither norm nor bias."""
        return len(self.shape) >= 2 and self.kind not in ("norm", "bias")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face names this rule stands for, in layer order."""
        if self.layers is None:
            return (self.name,)
        return tuple(self.name.format(layer=layer) for layer in range(self.layers))

    def to_flax(self, tensor: Array) -> tuple[Array, ...]:
        """One Hugging Face tensor (numpy or any array einops knows) -> one array per path, without the `layers` axis."""
        flax = einops.rearrange(tensor, self.pattern, **self._pattern_sizes)
        return tuple(flax[i] for i in range(len(self.paths))) if len(self.paths) > 1 else (flax,)

    def to_huggingface(self, *flax: Array) -> Array:
        """The inverse of `to_flax`, element for element."""
        left, right = self.pattern.split("->")
        joined = np.stack(flax) if len(self.paths) > 1 else flax[0]
        return einops.rearrange(joined, f"{right} -> {left}", **self._pattern_sizes)

    def read_slice(self, read: Callable[[tuple[slice, ...]], Array], path: int, index: Sequence[slice]) -> Array:
        """A slice of one layer of the Flax tensor `paths[path]`, from as little of the Hugging Face tensor as possible.

        read: returns the given Hugging Face slice of that layer's tensor.  index: one slice per Flax axis, `layers` left out.
        An axis that leads its group on the left is cut while reading, any other after rearranging.
        """
        axes = self.axes[1:] if self.layers is not None else self.axes
        wanted = {axis: part.indices(self.sizes[axis])[:2] for axis, part in zip(axes, index, strict=True)}
        cut: dict[str, int] = {}
        source = []
        for group in self._sides[0]:
            inner = math.prod(self.sizes[axis] for axis in group[1:])
            start, stop = wanted.get(group[0], (0, self.sizes[group[0]]))
            cut[group[0]] = stop - start
            source.append(slice(start * inner, stop * inner))
        flax = einops.rearrange(read(tuple(source)), self.pattern, **{**self._pattern_sizes, **cut})
        flax = flax[path] if len(self.paths) > 1 else flax
        return flax[tuple(slice(None) if axis in cut else slice(*wanted[axis]) for axis in axes)]


def flatten(rules: Sequence[WeightRule]) -> Iterator[tuple[str, WeightRule, int | None]]:
    """Every Hugging Face name with its rule and layer, in checkpoint order."""
    for rule in rules:
        for layer, name in enumerate(rule.names):
            yield name, rule, layer if rule.layers is not None else None
