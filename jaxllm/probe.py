"""The Probe protocol: one backend's model laid open for comparison, point by point.

A probe holds the model of a run on one device, dropout off, with weights that it is given, and answers with numpy arrays in
Hugging Face names, so that whoever compares two probes knows nothing of either framework.

Shape legend: B sequences, S tokens, R tokens of a source, E hidden, H heads, K key/value heads, D head_dim, X experts,
V vocabulary.

The points at which activations are compared, in the order in which a model computes them (`point_names`); before them, with
`encoder.` in front and R for S, those of its encoder, if it has one:

embedding                          (B, S, E)  what enters the first layer
layers.{i}.attention_norm          (B, S, E)  if the layer normalises what goes into attention
layers.{i}.query, .key, .value     (B, S, H or K, D)  after position encoding
layers.{i}.attention_output        (B, S, E)  after the output projection
layers.{i}.attention_output_norm   (B, S, E)  if the layer normalises what comes out of attention
layers.{i}.attention_residual      (B, S, E)  the residual stream with it added
layers.{i}.attention_residual_norm (B, S, E)  if the layer normalises the residual stream itself
layers.{i}.cross_attention_norm    (B, S, E)  in a decoder with an encoder, as are the following
layers.{i}.cross_query             (B, S, H, D)
layers.{i}.cross_key, .cross_value (B, R, K, D)
layers.{i}.cross_attention_output  (B, S, E)
layers.{i}.cross_attention_residual (B, S, E)
layers.{i}.mlp_norm                (B, S, E)  as attention_norm
layers.{i}.router                  (B, S, X)  the router's logits, if the layer has experts
layers.{i}.mlp_output              (B, S, E)
layers.{i}.mlp_output_norm         (B, S, E)  as attention_output_norm
layers.{i}.mlp_residual            (B, S, E)  the residual stream with it added, if the layer normalises that
layers.{i}.residual                (B, S, E)  the residual stream that leaves the layer
final_norm                         (B, S, E)  if the model normalises it once more
logits                             (B, S, V)  or (B, 1, L): L outputs for each row
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxllm.backend import Hyper
from jaxllm.config.schema import BackendName
from jaxllm.data.batch import Batch
from jaxllm.families import ModelSpec
from jaxllm.run import Run
from jaxllm.state.training_state import TensorReader

Array = NDArray[np.floating[Any]]

LAYER_POINTS = (
    "attention_norm",
    "query",
    "key",
    "value",
    "attention_output",
    "attention_output_norm",
    "attention_residual",
    "attention_residual_norm",
    "cross_attention_norm",
    "cross_query",
    "cross_key",
    "cross_value",
    "cross_attention_output",
    "cross_attention_residual",
    "mlp_norm",
    "router",
    "mlp_output",
    "mlp_output_norm",
    "mlp_residual",
    "residual",
)


def layer_points(spec: ModelSpec, *, cross: bool = False) -> tuple[str, ...]:
    """The points of a layer, in forward order.  cross: of one that reads an encoder."""
    norm = spec.norm
    norms = {"attention_norm": norm.before, "mlp_norm": norm.before}
    norms |= {"attention_output_norm": norm.after, "mlp_output_norm": norm.after}
    norms |= {"attention_residual_norm": norm.of_residual, "mlp_residual": norm.of_residual}
    has = norms | {"router": spec.mlp.experts is not None}
    return tuple(point for point in LAYER_POINTS if has.get(point, cross or not point.startswith("cross_")))


def point_names(spec: ModelSpec) -> tuple[str, ...]:
    """Every point of a model, in forward order."""

    def stack(layers: int, *, cross: bool) -> tuple[str, ...]:
        inside = (f"layers.{layer}.{point}" for layer in range(layers) for point in layer_points(spec, cross=cross))
        return ("embedding", *inside, *(() if spec.norm.of_residual else ("final_norm",)))

    encoder = () if spec.encoder is None else stack(len(spec.encoder.attentions), cross=False)
    return (*(f"encoder.{point}" for point in encoder), *stack(spec.layers, cross=spec.encoder is not None), "logits")


def of_source(point: str) -> bool:
    """Whether a point is of the tokens of a source: in the encoder, or what a decoder's layer makes of its output."""
    return point.startswith("encoder.") or point.endswith((".cross_key", ".cross_value"))


@dataclass(frozen=True)
class Choices:
    """What one router decided.  logits: (B, S, X).  chosen: (B, S, K), the experts of each token."""

    logits: Array
    chosen: NDArray[np.int64]


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass over a global batch.

    loss: sum of weighted token losses / sum of weights.  logits: (B, S, V).  gradients: of the loss, by Hugging Face name, as
    accumulated over the run's micro-batches, before clipping.  values, cotangents: by point, the activation and the gradient
    of the loss with respect to it; empty unless asked for.  choices: of every router in the forward pass, by point.
    fp32, or fp64 for an fp64 run.
    """

    loss: float
    logits: Array
    gradients: Mapping[str, Array]
    values: Mapping[str, Array] = field(default_factory=dict)
    cotangents: Mapping[str, Array] = field(default_factory=dict)
    choices: Mapping[str, Choices] = field(default_factory=dict)


class Probe(Protocol):
    """One side of a comparison."""

    @property
    def name(self) -> BackendName:
        """Which backend this is."""
        ...

    def load(self, run: Run, params: TensorReader) -> None:
        """Build the model of `run` in its precision and fill it with `params` (Hugging Face names)."""
        ...

    def passes(self, batch: Batch, *, capture: bool = False, choices: Mapping[str, Choices] | None = None) -> Pass:
        """Forward and backward over all rows of a global batch, in micro-batches of `training.micro_batch` rows if that is set.

        capture: also record `values` and `cotangents`; the whole batch is then one micro-batch.  choices: by point, the experts
        that routers choose instead of what they would, which only the transformers model can be told; the pass has what they
        would have chosen.
        """
        ...

    def after_step(self, batch: Batch, hyper: Hyper) -> Mapping[str, Array]:
        """The parameters after one optimiser step on `batch` from the loaded weights and zero moments, by Hugging Face name.

        It goes through the backend's real training step.  The loaded weights stay as they are.
        """
        ...
