"""What a mixture of experts may have computed: as the config says it, and the mistakes that people make.

Shape legend: B sequences, S tokens, E hidden, X experts, M size of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

from jaxllm.families.spec import ExpertsSpec

F64 = NDArray[np.float64]
Activation = Callable[[F64], F64]


@dataclass(frozen=True)
class Kernels:
    """gate, up: (X, E, M); down: (X, M, E)."""

    gate: F64
    up: F64
    down: F64

    def mix(self, x_BSE: F64, weights_BSX: F64, activation: Activation, *, weighs_inputs: bool = False) -> F64:
        """The sum over experts of their outputs times the weights; an expert sees only tokens whose weight is not zero."""
        y_BSE = np.zeros((*x_BSE.shape[:2], self.down.shape[-1]))
        for expert, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down, strict=True)):
            chosen_BS = weights_BSX[..., expert] != 0.0
            x_TE, weight_T1 = x_BSE[chosen_BS], weights_BSX[..., expert][chosen_BS][:, None]
            x_TE, factor_T1 = (x_TE * weight_T1, np.ones_like(weight_T1)) if weighs_inputs else (x_TE, weight_T1)
            y_BSE[chosen_BS] += factor_T1 * ((activation(x_TE @ gate) * (x_TE @ up)) @ down)
        return y_BSE


def routings(spec: ExpertsSpec, logits_BSX: F64) -> Iterator[tuple[str | None, F64]]:
    """Weights (B, S, X) of every expert for every token, zero for those not chosen; the config's own first, without a name."""
    probabilities = softmax(logits_BSX, axis=-1)
    yield None, _chosen(spec, probabilities)
    summed = "router weights that are not divided by their sum" if spec.normalised else "router weights divided by their sum"
    yield summed, _chosen(replace(spec, normalised=not spec.normalised), probabilities)
    for count in (spec.per_token - 1, spec.per_token + 1):
        if 1 <= count <= spec.count:
            yield f"{count} experts for each token", _chosen(replace(spec, per_token=count), probabilities)
    yield "every expert for each token", _chosen(replace(spec, per_token=spec.count), probabilities)
    yield "a router with a sigmoid instead of its softmax", _chosen(spec, expit(logits_BSX))
    configured = _chosen(spec, probabilities)
    yield "experts without router weights", (configured != 0.0).astype(np.float64)
    yield "the experts that the router likes least", _chosen(spec, probabilities, order=probabilities)
    if spec.count > 1:
        yield "the next expert instead of the chosen one", np.roll(configured, 1, axis=-1)
        yield "the expert before the chosen one", np.roll(configured, -1, axis=-1)


def _chosen(spec: ExpertsSpec, scores_BSX: F64, order: F64 | None = None) -> F64:
    """The scores of the `per_token` experts that come first in `order` (default: largest scores first), 0 for the others."""
    best_BSK = np.argsort(-scores_BSX if order is None else order, axis=-1, kind="stable")[..., : spec.per_token]
    weights_BSX: F64 = np.zeros_like(scores_BSX)
    np.put_along_axis(weights_BSX, best_BSK, np.take_along_axis(scores_BSX, best_BSK, axis=-1), axis=-1)
    return weights_BSX / weights_BSX.sum(-1, keepdims=True) if spec.normalised else weights_BSX


def exchanged(kernels: Kernels) -> Iterator[tuple[str, Kernels]]:
    """The kernels mistaken for one another, transposed or cut apart in another way."""
    gate, up, down = kernels.gate, kernels.up, kernels.down
    yield "gate and up exchanged", replace(kernels, gate=up, up=gate)
    fused_X2ME = np.concatenate([gate, up], axis=-1).swapaxes(1, 2)
    turns = {"gate": fused_X2ME[:, ::2].swapaxes(1, 2), "up": fused_X2ME[:, 1::2].swapaxes(1, 2)}
    yield "gate and up weights taken in turns (2i, 2i + 1)", Kernels(turns["gate"], turns["up"], down)
    if gate.shape[1] == gate.shape[2]:
        yield "the transposed down weight of every expert", replace(kernels, down=down.swapaxes(1, 2))
        yield "the transposed gate weight of every expert", replace(kernels, gate=gate.swapaxes(1, 2))
        yield "the transposed up weight of every expert", replace(kernels, up=up.swapaxes(1, 2))
        both = replace(kernels, gate=gate.swapaxes(1, 2), up=up.swapaxes(1, 2))
        yield "the transposed gate and up weights of every expert", both
    if fused_X2ME.shape[1] == fused_X2ME.shape[2]:
        first, second = np.split(fused_X2ME, 2, axis=-1)
        yield "the transposed gate and up weights of every expert", Kernels(first, second, down)


def expert_candidates(
    spec: ExpertsSpec,
    x_BSE: F64,
    logits_BSX: F64,
    kernels: Kernels,
    activation: str,
    activations: Mapping[str, Activation],
    as_configured: str,
) -> Iterator[tuple[str, F64]]:
    """Outputs of a mixture of experts.  logits: of the router, on which both sides agree.  activation: the config's."""
    act = activations[activation]
    configured_BSX = next(routings(spec, logits_BSX))[1]
    for said, weights_BSX in routings(spec, logits_BSX):
        yield said or as_configured, kernels.mix(x_BSE, weights_BSX, act)
    yield "router weights on what goes into the experts", kernels.mix(x_BSE, configured_BSX, act, weighs_inputs=True)
    for said, others in exchanged(kernels):
        yield said, others.mix(x_BSE, configured_BSX, act)
    for name, other in activations.items():
        if name != activation:
            yield f"the activation {name}", kernels.mix(x_BSE, configured_BSX, other)
