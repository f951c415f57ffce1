"""What did each side compute at the point where they depart?  Known mistakes are tried until one gives its very values.

Everything before the point agrees, so the point's inputs are known.  From them each candidate, the operation as the config
says it first and then the mistakes that people make, is computed here in float64 numpy and compared with both sides.

Shape legend: B sequences, S queries, T keys, E hidden, H heads, K key/value heads, G = H / K, D head_dim, M MLP, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf, expit, softmax

from jaxllm.data.batch import Batch
from jaxllm.families import Model
from jaxllm.families.rope import RopeSpec, inverse_frequencies
from jaxllm.parity.diagnose_experts import Kernels, expert_candidates
from jaxllm.parity.tolerances import relative_error
from jaxllm.probe import Array
from jaxllm.state import TensorReader

F64 = NDArray[np.float64]
AS_CONFIGURED = "what the config says"
_MATCH = 1e-3  # a candidate is what a side computed when it leaves less than this of what the sides differ by

ACTIVATIONS: Mapping[str, Callable[[F64], F64]] = {
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: 0.5 * x * (1.0 + erf(x / math.sqrt(2.0))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0.0),
}
_EPSILONS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3)


@dataclass(frozen=True)
class Diagnosis:
    """What each side computed, by its name, as far as it was recognised."""

    computed: Mapping[str, str]

    def __str__(self) -> str:
        said = [f"{side} computes {what}" for side, what in self.computed.items()]
        return "; ".join(said) if said else "neither side computes anything that was tried"


class Bench:
    """The inputs of every point: weights in Flax layout, activations that both sides agree on, the batch."""

    def __init__(self, model: Model, weights: TensorReader, batch: Batch, values: Mapping[str, Array]) -> None:
        self._model = model
        self._spec = model.spec
        self._weights = weights
        self._batch = batch
        self._values = values

    def diagnose(self, point: str, sides: Mapping[str, Array]) -> Diagnosis:
        """Recognise what each side computed at `point`.  sides: name of the side -> its values."""
        one, other = (np.asarray(value, np.float64) for value in sides.values())
        apart = relative_error(one, other)
        computed = {}
        for side, values in sides.items():
            errors = [(relative_error(values, candidate), name) for name, candidate in self._candidates(point)]
            if errors:
                error, name = min(errors, key=itemgetter(0))  # of equals the first, which is the config's own
                if error <= _MATCH * apart:
                    computed[side] = name
        return Diagnosis(computed)

    def _candidates(self, point: str) -> Iterator[tuple[str, F64]]:
        *place, kind = point.split(".")
        layer = int(place[1]) if place else None
        makers: Mapping[str, Callable[[int | None], Iterator[tuple[str, F64]]]] = {
            "embedding": self._embeddings,
            "attention_norm": lambda layer: self._norms("layers.attention_norm", layer, self._entering(layer)),
            "attention_output_norm": lambda layer: self._output_norms("attention_output", layer),
            "query": lambda layer: self._projections("query", layer),
            "key": lambda layer: self._projections("key", layer),
            "value": lambda layer: self._projections("value", layer),
            "attention_output": self._attentions,
            "mlp_norm": lambda layer: self._norms("layers.mlp_norm", layer, self._at(f"layers.{layer}.attention_residual")),
            "router": self._routers,
            "mlp_output": self._mlps if self._spec.mlp.experts is None else self._experts,
            "mlp_output_norm": lambda layer: self._output_norms("mlp_output", layer),
            "final_norm": lambda _: self._norms("final_norm", None, self._entering(self._spec.layers)),
        }
        if kind in makers:
            yield from makers[kind](layer)

    # ---------------------------------------------------------------------------------------------------------- inputs
    def _at(self, point: str) -> F64:
        return np.asarray(self._values[point], np.float64)

    def _entering(self, layer: int | None) -> F64:
        return self._at(f"layers.{layer - 1}.residual" if layer else "embedding")

    def _read_by(self, part: str, layer: int | None) -> F64:
        """What goes into a layer's attention or MLP."""
        if self._spec.norm.before:
            return self._at(f"layers.{layer}.{part}_norm")
        return self._entering(layer) if part == "attention" else self._at(f"layers.{layer}.attention_residual")

    def _weight(self, path: str, layer: int | None) -> F64 | None:
        """A Flax tensor of one layer, from the Hugging Face weights; None if the model has none of that path."""
        for rule in self._model.rules:
            if path in rule.paths:
                tensor = self._weights.read(rule.names[layer or 0])
                flax: F64 = np.asarray(rule.to_flax(tensor)[rule.paths.index(path)], np.float64)
                return flax
        return None

    def _bias(self, path: str, layer: int | None) -> F64 | float:
        bias = self._weight(path, layer)
        return 0.0 if bias is None else bias

    # ------------------------------------------------------------------------------------------------------ candidates
    def _embeddings(self, _: int | None) -> Iterator[tuple[str, F64]]:
        table = self._weight("embed.embedding", None)
        if table is None:
            return
        given = self._spec.embedding_scale
        x_BSE = table[self._batch.inputs] * (1.0 if given is None else given)
        positions_PE = self._weight("position_embed.embedding", None)
        if positions_PE is None:
            yield AS_CONFIGURED, x_BSE
        else:
            for name, positions_BS in self._positions():
                yield name, x_BSE + positions_PE[np.clip(positions_BS, 0, len(positions_PE) - 1)]
            yield "embeddings without positions", x_BSE
        if given is None:
            yield "embeddings scaled by sqrt(hidden_size)", x_BSE * math.sqrt(x_BSE.shape[-1])
        else:
            yield "embeddings without their scale", x_BSE / given

    def _positions(self) -> Iterator[tuple[str, NDArray[np.int64]]]:
        given = self._batch.positions.astype(np.int64)
        yield AS_CONFIGURED, given
        yield "positions that begin at 1", given + 1
        yield "positions that begin at -1", given - 1
        yield "positions that do not restart at each document", np.broadcast_to(np.arange(given.shape[1]), given.shape)

    def _norms(self, path: str, layer: int | None, x_BSE: F64) -> Iterator[tuple[str, F64]]:
        scale, bias = self._weight(f"{path}.scale", layer), self._bias(f"{path}.bias", layer)
        if scale is None:
            return
        configured = self._spec.norm
        offset, other = (1.0, 0.0) if configured.unit_offset else (0.0, 1.0)
        for kind in (configured.kind, *({"rms", "layer"} - {configured.kind})):
            centred = x_BSE - x_BSE.mean(-1, keepdims=True) if kind == "layer" else x_BSE
            square = np.square(centred).mean(-1, keepdims=True)
            for eps in dict.fromkeys((configured.eps, *_EPSILONS)):
                normed = centred / np.sqrt(square + eps)
                expected = kind == configured.kind and eps == configured.eps
                name = AS_CONFIGURED if expected else f"a norm of kind {kind} with epsilon {eps:g}"
                yield name, normed * (scale + offset) + bias
            name = f"a norm of kind {kind} with {'1 + scale' if other else 'scale for 1 + scale'}"
            yield name, centred / np.sqrt(square + configured.eps) * (scale + other) + bias

    def _output_norms(self, point: str, layer: int | None) -> Iterator[tuple[str, F64]]:
        yield from self._norms(f"layers.{point}_norm", layer, self._at(f"layers.{layer}.{point}"))

    def _projections(self, which: str, layer: int | None) -> Iterator[tuple[str, F64]]:
        kernel = self._weight(f"layers.attention.{which}.kernel", layer)
        if kernel is None:
            return
        x_BSE, bias = self._read_by("attention", layer), self._bias(f"layers.attention.{which}.bias", layer)
        rope = self._spec.attentions[layer or 0].rope
        kernels = {AS_CONFIGURED: kernel}
        hidden, heads, head_dim = kernel.shape
        if hidden == heads * head_dim:
            kernels["the transposed weight"] = kernel.reshape(hidden, hidden).T.reshape(kernel.shape)
        for name, weight in kernels.items():
            projected = np.einsum("bse,ehd->bshd", x_BSE, weight) + bias
            normed = projected if which == "value" else self._heads_norm(which, layer, projected)
            if rope is None or which == "value":
                yield name, normed
            elif name == AS_CONFIGURED:
                yield from self._rotations(rope, normed)
                if normed is not projected:
                    said = "without the norm of queries and keys"
                    yield said, next(self._rotations(rope, projected))[1]
            else:
                yield name, next(self._rotations(rope, normed))[1]

    def _heads_norm(self, which: str, layer: int | None, x_BSHD: F64) -> F64:
        """The norm of queries and keys, if the model has one."""
        scale, over = self._weight(f"layers.attention.{which}_norm.scale", layer), self._spec.attention.query_key_norm
        if scale is None:
            return x_BSHD
        axes = (-1,) if over == "head" else (-2, -1)
        normed: F64 = x_BSHD / np.sqrt(np.square(x_BSHD).mean(axes, keepdims=True) + self._spec.norm.eps)
        return normed * (scale + 1.0 if self._spec.norm.unit_offset else scale)

    def _rotations(self, rope: RopeSpec, x_BSHD: F64) -> Iterator[tuple[str, F64]]:
        """Rotary positions (arXiv:2104.09864) in both layouts and with the positions and scalings people mistake."""
        length = self._batch.inputs.shape[1]
        for name, positions_BS in self._positions():
            yield name, _rotated(rope, x_BSHD, positions_BS, length)
            if name == AS_CONFIGURED:
                if rope.scaling is not None:
                    plain = replace(rope, scaling=None)
                    yield "rotary positions without their scaling", _rotated(plain, x_BSHD, positions_BS, length)
                kept = rope.rotated(x_BSHD.shape[-1])
                halves = np.concatenate([x_BSHD[..., 0:kept:2], x_BSHD[..., 1:kept:2], x_BSHD[..., kept:]], -1)
                turned = _rotated(rope, halves, positions_BS, length)
                first, second = np.split(turned[..., :kept], 2, -1)
                pairs = np.stack([first, second], -1).reshape((*first.shape[:-1], kept))
                yield "rotary positions that pair neighbours (2i, 2i + 1)", np.concatenate([pairs, turned[..., kept:]], -1)
        yield "no rotary positions", x_BSHD

    def _attentions(self, layer: int | None) -> Iterator[tuple[str, F64]]:
        kernel = self._weight("layers.attention.output.kernel", layer)
        if kernel is None:
            return
        bias, spec = self._bias("layers.attention.output.bias", layer), self._spec.attentions[layer or 0]
        segments = self._batch.segments
        length = segments.shape[1]
        causal = np.tril(np.ones((length, length), bool))[None]
        full = causal
        if spec.window is not None:
            causal = causal & ~np.tril(np.ones((length, length), bool), -spec.window)[None]
        documents = segments[:, :, None] == segments[:, None, :]
        variants: dict[str, tuple[NDArray[np.bool_], float]] = {
            AS_CONFIGURED: (causal & documents, spec.scale),
            "attention that leaks across documents": (np.broadcast_to(causal, documents.shape), spec.scale),
            "attention to later tokens": (documents, spec.scale),
            "attention without its scale": (causal & documents, 1.0),
            "attention scaled by 1 / head_dim": (causal & documents, 1.0 / spec.head_dim),
        }
        if spec.window is not None:
            wider = full & ~np.tril(np.ones((length, length), bool), -spec.window - 1)[None]
            variants["attention without its window"] = (full & documents, spec.scale)
            variants["attention with a window of one token more"] = (wider & documents, spec.scale)
        for name, (mask, scale) in variants.items():
            yield name, np.einsum("bshd,hde->bse", self._mix(layer, mask, scale, spec.softcap), kernel) + bias
        if spec.softcap is not None:
            mixed = self._mix(layer, causal & documents, spec.scale, None)
            yield "attention without its soft cap", np.einsum("bshd,hde->bse", mixed, kernel) + bias
        square = kernel.reshape(-1, kernel.shape[-1])
        if square.shape[0] == square.shape[1]:
            mixed = self._mix(layer, causal & documents, spec.scale, spec.softcap)
            yield "the transposed output weight", np.einsum("bshd,hde->bse", mixed, square.T.reshape(kernel.shape)) + bias

    def _mix(self, layer: int | None, mask_BST: NDArray[np.bool_], scale: float, softcap: float | None) -> F64:
        query, key, value = (self._at(f"layers.{layer}.{name}") for name in ("query", "key", "value"))
        groups = query.shape[2] // key.shape[2]
        scores = np.einsum("bshd,bthd->bhst", query, np.repeat(key, groups, axis=2)) * scale
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        scores = np.where(mask_BST[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed: F64 = np.einsum("bhst,bthd->bshd", weights, np.repeat(value, groups, axis=2))
        return mixed

    def _mlps(self, layer: int | None) -> Iterator[tuple[str, F64]]:
        up, down = self._weight("layers.mlp.up.kernel", layer), self._weight("layers.mlp.down.kernel", layer)
        if up is None or down is None:
            return
        x_BSE, spec = self._read_by("mlp", layer), self._spec.mlp
        x_up = x_BSE @ up + self._bias("layers.mlp.up.bias", layer)
        gate = self._weight("layers.mlp.gate.kernel", layer)
        x_gate = None if gate is None else x_BSE @ gate + self._bias("layers.mlp.gate.bias", layer)
        bias = self._bias("layers.mlp.down.bias", layer)
        for name, activation in ACTIVATIONS.items():
            inner = activation(x_up) if x_gate is None else activation(x_gate) * x_up
            said = AS_CONFIGURED if name == spec.activation else f"the activation {name}"
            yield said, inner @ down + bias
            if x_gate is not None and name == spec.activation:
                yield "gate and up exchanged", (activation(x_up) * x_gate) @ down + bias
            if down.shape[0] == down.shape[1] and name == spec.activation:
                yield "the transposed down weight", inner @ down.T + bias

    def _routers(self, layer: int | None) -> Iterator[tuple[str, F64]]:
        kernel = self._weight("layers.mlp.router.kernel", layer)
        if kernel is None:
            return
        x_BSE = self._read_by("mlp", layer)
        yield AS_CONFIGURED, x_BSE @ kernel
        yield "a router that reads what has not been normalised", self._at(f"layers.{layer}.attention_residual") @ kernel
        yield "a router that reads what attention reads", self._read_by("attention", layer) @ kernel
        if kernel.shape[0] == kernel.shape[1]:
            yield "the transposed router weight", x_BSE @ kernel.T
        logits_BSX = x_BSE @ kernel
        yield "the router's probabilities in place of its logits", softmax(logits_BSX, axis=-1)

    def _experts(self, layer: int | None) -> Iterator[tuple[str, F64]]:
        spec, weights = self._spec.mlp, [self._weight(f"layers.mlp.{name}.kernel", layer) for name in ("gate", "up", "down")]
        gate, up, down = weights
        if spec.experts is None or gate is None or up is None or down is None:
            return
        logits, kernels = self._at(f"layers.{layer}.router"), Kernels(gate, up, down)
        x_BSE = self._read_by("mlp", layer)
        yield from expert_candidates(spec.experts, x_BSE, logits, kernels, spec.activation, ACTIVATIONS, AS_CONFIGURED)


def _rotated(rope: RopeSpec, x_BSHD: F64, positions_BS: NDArray[np.int64], length: int) -> F64:
    """Half-split rotary positions, the dimensions behind the rotated ones as they are."""
    angles = positions_BS[..., None] * inverse_frequencies(rope, x_BSHD.shape[-1], length, np.dtype(np.float64))
    cos, sin = (rope.attention_factor * turn(angles)[:, :, None] for turn in (np.cos, np.sin))
    turned, rest = np.split(x_BSHD, [rope.rotated(x_BSHD.shape[-1])], -1)
    first, second = np.split(turned, 2, -1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)


def recognise_loss(sides: Mapping[str, float], token_losses: F64, weights: F64, rows: int) -> Diagnosis:
    """Which mean of the token losses (B, S) each side reports.  rows: of a micro-batch."""
    total = float((token_losses * weights).sum() / weights.sum())
    parts = [slice(start, start + rows) for start in range(0, len(weights), rows)]
    means = [(token_losses[part] * weights[part]).sum() / max(weights[part].sum(), 1.0) for part in parts]
    candidates: dict[str, Any] = {
        AS_CONFIGURED: total,
        "the average of the micro-batches' means": float(np.mean(means)),
        "a mean over padding too": float((token_losses * weights).sum() / weights.size),
    }
    apart = max(sides.values()) - min(sides.values())
    computed = {}
    for side, loss in sides.items():
        name = min(candidates, key=lambda candidate: abs(candidates[candidate] - loss))
        if abs(candidates[name] - loss) <= _MATCH * apart:
            computed[side] = name
    return Diagnosis(computed)
