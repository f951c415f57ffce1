"""WeightRule: how one Hugging Face tensor and its place in the Flax model are the same numbers.

A rule is one line: the Hugging Face name, the Flax path(s), and an einops pattern read from left (Hugging Face) to right
(Flax), for example

    model.layers.{layer}.self_attn.q_proj.weight -> layers.attention.query.kernel
    "(heads head_dim) embed -> embed heads head_dim"

Patterns only rearrange, never compute, so that one rule moves weights, gradients and Adam moments in both directions.  The
axis names on the right are the logical axes that `jaxllm.jax_backend` maps to the mesh.  A name with `{layer}` stands for one
Hugging Face tensor per layer and one Flax tensor with a leading `layers` axis.  Several paths mean that the first axis on the
right is split, one index per path (GPT-2's fused query, key and value), or, with `|` between one pattern for each path, that
the Hugging Face tensor is what is left of the arrows one after another along its first axis (Phi-3's, whose query is larger
than its key and value).
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
    (a tied output head), which a checkpoint may hold but never needs.  idle: no output depends on it, so that its gradient is
    zero but for rounding (the bias of keys, which adds the same to all scores of a query; softmax takes it out).  pieces:
    names, with `{layer}` and `{expert}`, under which checkpoints hold the tensor cut up: for each expert its pieces, one after
    another along its first axis.
    """

    name: str
    paths: tuple[str, ...]
    pattern: str
    kind: WeightKind
    init: Initializer
    sizes: Mapping[str, int] = field(repr=False)
    layers: int | None = None
    aliases: tuple[str, ...] = ()
    idle: bool = False
    pieces: tuple[str, ...] = ()

    @cached_property
    def _blocks(self) -> tuple[_Block, ...]:
        return tuple(_Block.of(pattern, self.sizes) for pattern in self.pattern.split("|"))

    @property
    def _is_split(self) -> bool:
        """Whether the paths are the indices of one axis; else there is a block for each."""
        return len(self._blocks) < len(self.paths)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Hugging Face shape of one layer's tensor."""
        first, *others = (block.shape for block in self._blocks)
        return (first[0] + sum(other[0] for other in others), *first[1:]) if others else first

    @cached_property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """Logical axes of the Flax tensor of each path, `layers` first when stacked; the split axis is not among them."""
        return tuple(("layers", *axes) if self.layers is not None else axes for axes in self._inner_axes)

    @cached_property
    def _inner_axes(self) -> tuple[tuple[str, ...], ...]:
        if self._is_split:
            return (self._blocks[0].axes[1:],) * len(self.paths)
        return tuple(block.axes for block in self._blocks)

    @cached_property
    def flax_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of the Flax tensor of each path, all layers stacked."""
        sizes = {**self.sizes, "layers": self.layers or 0}
        return tuple(tuple(sizes[axis] for axis in axes) for axes in self.axes)

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

    def stored_pieces(self, layer: int | None) -> tuple[tuple[str, ...], ...]:
        """Names of the pieces of one layer's tensor, by expert; one row of them where there are no experts."""
        by_expert = any("{expert}" in piece for piece in self.pieces)
        rows = range(self.shape[0] if by_expert else 1)
        return tuple(tuple(piece.format(layer=layer, expert=row) for piece in self.pieces) for row in rows)

    def to_flax(self, tensor: Array) -> tuple[Array, ...]:
        """One Hugging Face tensor (numpy or any array einops knows) -> one array per path, without the `layers` axis."""
        if self._is_split:
            flax = self._blocks[0].to_flax(tensor)
            return tuple(flax[i] for i in range(len(self.paths)))
        parts, start = [], 0
        for block in self._blocks:
            parts.append(block.to_flax(tensor[start : start + block.shape[0]] if len(self._blocks) > 1 else tensor))
            start += block.shape[0] if block.shape else 0
        return tuple(parts)

    def to_huggingface(self, *flax: Array) -> Array:
        """The inverse of `to_flax`, element for element."""
        if self._is_split:
            return self._blocks[0].to_huggingface(np.stack(flax))
        parts = [block.to_huggingface(part) for block, part in zip(self._blocks, flax, strict=True)]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def read_slice(self, read: Callable[[tuple[slice, ...]], Array], path: int, index: Sequence[slice]) -> Array:
        """A slice of one layer of the Flax tensor `paths[path]`, from as little of the Hugging Face tensor as possible.

        read: returns the given Hugging Face slice of that layer's tensor.  index: one slice per Flax axis, `layers` left out.
        An axis that leads its group on the left is cut while reading, any other after rearranging.
        """
        axes = self._inner_axes[path]
        wanted = {axis: part.indices(self.sizes[axis])[:2] for axis, part in zip(axes, index, strict=True)}
        block = self._blocks[0 if self._is_split else path]
        before = 0 if self._is_split or len(self._blocks) == 1 else sum(each.shape[0] for each in self._blocks[:path])
        cut: dict[str, int] = {}
        source = []
        for group in block.left:
            inner = math.prod(self.sizes[axis] for axis in group[1:])
            start, stop = wanted.get(group[0], (0, self.sizes[group[0]]))
            cut[group[0]] = stop - start
            source.append(slice(before + start * inner, before + stop * inner))
            before = 0  # only the first axis is one block after another
        flax = block.to_flax(read(tuple(source)), cut)
        flax = flax[path] if self._is_split else flax
        return flax[tuple(slice(None) if axis in cut else slice(*wanted[axis]) for axis in axes)]


@dataclass(frozen=True)
class _Block:
    """One einops pattern with the sizes of its axes."""

    pattern: str
    left: list[list[str]]
    right: list[list[str]]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, pattern: str, sizes: Mapping[str, int]) -> _Block:
        left, right = (_groups(side) for side in pattern.split("->"))
        return cls(pattern.strip(), left, right, {axis: sizes[axis] for group in left for axis in group})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[axis] for axis in group) for group in self.left)

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(group[0] for group in self.right)

    def to_flax(self, tensor: Array, cut: Mapping[str, int] | None = None) -> Array:
        """cut: sizes of axes of which there is only a part."""
        return einops.rearrange(tensor, self.pattern, **{**self.sizes, **(cut or {})})

    def to_huggingface(self, flax: Array) -> Array:
        left, right = self.pattern.split("->")
        return einops.rearrange(flax, f"{right} -> {left}", **self.sizes)


@dataclass(frozen=True)
class Leaf:
    """One parameter of the Flax model.  position: among the paths of its rule."""

    path: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    rule: WeightRule
    position: int


def flax_leaves(rules: Sequence[WeightRule]) -> Iterator[Leaf]:
    """Every parameter of the Flax model, in checkpoint order."""
    for rule in rules:
        for position, path in enumerate(rule.paths):
            yield Leaf(path, rule.axes[position], rule.flax_shapes[position], rule, position)


def flatten(rules: Sequence[WeightRule]) -> Iterator[tuple[str, WeightRule, int | None]]:
    """Every Hugging Face name with its rule and layer, in checkpoint order."""
    for rule in rules:
        for layer, name in enumerate(rule.names):
            yield name, rule, layer if rule.layers is not None else None
