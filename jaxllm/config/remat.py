"""What the backward pass may keep of a layer instead of computing it again (`jax.remat`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from jaxllm.config.messages import closest

RematPolicy: TypeAlias = Literal["none", "full", "dots", "products", "offload"]

HOST = "@host"
"""What follows a point that is kept in the host's memory."""

REMAT_POINTS: Mapping[str, str] = {
    "layer_input": "the residual stream that comes into the layer",
    "attention_norm": "the norm before attention",
    "query": "queries, with their positions",
    "key": "keys, with their positions",
    "value": "values",
    "attention_mixed": "what the attention kernel gives: mixed values, and the softmax's totals where the kernel keeps them",
    "attention_output": "the projection after attention",
    "attention_output_norm": "the norm after attention, where a family has one",
    "attention_residual": "the residual stream between attention and MLP",
    "cross_attention_norm": "the norm before attention to a source, in the decoder of an encoder-decoder",
    "cross_query": "queries to a source",
    "cross_key": "keys of a source",
    "cross_value": "values of a source",
    "cross_attention_output": "the projection after attention to a source",
    "cross_attention_residual": "the residual stream behind attention to a source",
    "mlp_norm": "the norm before the MLP",
    "mlp_gate": "the product that goes through the activation of a gated MLP",
    "mlp_up": "the other product into the MLP",
    "mlp_inner": "what goes into the product out of the MLP",
    "mlp_output": "the product out of the MLP",
    "mlp_output_norm": "the norm after the MLP, where a family has one",
}
"""Points of a layer by name, in forward order."""

PRODUCTS = ("layer_input", "query", "key", "value", "attention_mixed", "attention_residual", "mlp_gate", "mlp_up")
"""What `products` keeps, and `offload` in host memory: enough that no product of a layer is computed again."""


@dataclass(frozen=True)
class Kept:
    """Points kept in the memory of the device, and in that of the host."""

    device: tuple[str, ...]
    host: tuple[str, ...]


def kept_points(remat: RematPolicy | tuple[str, ...]) -> Kept | None:
    """What a list of names, `products` or `offload`, keeps; None for the policies that are not about names."""
    if remat == "products":
        return Kept(PRODUCTS, ())
    if remat == "offload":
        return Kept((), PRODUCTS)
    if isinstance(remat, str):
        return None
    host = tuple(name.removesuffix(HOST) for name in remat if name.endswith(HOST))
    return Kept(tuple(name for name in remat if not name.endswith(HOST)), host)


def check_remat_names(names: tuple[str, ...]) -> None:
    """ValueError when a name is no point of a layer or comes twice."""
    points = [name.removesuffix(HOST) for name in names]
    for point in points:
        if point not in REMAT_POINTS:
            near = closest(point, REMAT_POINTS)
            hint = f"did you mean {near!r}? (" if near else "("
            raise ValueError(f"no point of a layer is called {point!r}; {hint}points: {', '.join(REMAT_POINTS)})")
        if points.count(point) > 1:
            raise ValueError(f"{point} comes twice; name it once, with or without {HOST}")
