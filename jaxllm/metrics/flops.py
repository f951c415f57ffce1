"""Model FLOPs: what the mathematics of a step needs, whatever the program does.

One formula for every backend, in the sense of PaLM's appendix B (Chowdhery et al., arXiv:2204.02311).  Per token, forward,
with S tokens in the sequence, E hidden size, H query heads and K key/value heads of D dimensions, M MLP size, V vocabulary
and L layers, a multiply-add being 2 FLOPs:

    projections   L * 2 * (E*H*D + 2*E*K*D + H*D*E)      query, key and value, output
    attention     L * 2 * (H*D*S)                        scores and weighted values: 2 * 2*H*D*S, and half of it is masked;
                                                         of a layer with a window W < S, 2 * 2*H*D * (W - W^2 / 2S)
    mlp           L * 2 * (3*E*M)                        gate, up, down; 2*E*M without a gate; with X experts, K of them for
                                                         each token, L * 2 * (K * 3*E*M + E*X)
    head          2 * E*V                                logits, tied or not

An encoder-decoder has R tokens in the source and S in the target: its encoder is counted over R; its decoder's layers also have
cross attention, whose keys and values are made of R tokens, and of which every query sees all R.  A row has R + S tokens.

The backward pass costs twice the forward pass.  Not counted: the embedding lookup (no arithmetic), norms, activations, softmax,
rotary positions, the optimiser (all small), and anything computed twice (rematerialisation), since the model does not need it.

Causal attention is counted once: a token attends to half of the sequence on average.  PaLM counts the full square, which
flatters long sequences.  An encoder attends to the whole sequence and is counted so.  Every sequence counts as one document,
also where packed documents do not attend to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from jaxllm.families.spec import AttentionSpec, EncoderSpec, ModelSpec

BACKWARD = 2.0
"""FLOPs of the backward pass in units of the forward pass: one product for the inputs' gradient, one for the weights'."""


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward FLOPs per token, by part of the model."""

    projections: float = 0.0
    attention: float = 0.0
    mlp: float = 0.0
    head: float = 0.0

    def __add__(self, other: FlopsPerToken) -> FlopsPerToken:
        return FlopsPerToken(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> FlopsPerToken:
        return FlopsPerToken(*(factor * part for part in astuple(self)))

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass."""
        return self.projections + self.attention + self.mlp + self.head

    @property
    def training(self) -> float:
        """FLOPs of the forward and the backward pass."""
        return (1.0 + BACKWARD) * self.forward


def flops_per_token(model: ModelSpec, sequence_length: int, target_length: int | None = None) -> FlopsPerToken:
    """Model FLOPs per token, by the formula above.  target_length: S of an encoder-decoder, R being sequence_length."""
    if model.encoder is None:
        return _stack(model, model.attentions, sequence_length) + FlopsPerToken(head=_head(model, sequence_length))
    source, target = sequence_length, target_length or sequence_length
    row = (
        _stack(model, model.encoder.attentions, source) * source
        + _stack(model, model.attentions, target) * target
        + _across(model, model.encoder, source, target)
        + FlopsPerToken(head=_head(model, target)) * target
    )
    return row * (1 / (source + target))


def _stack(model: ModelSpec, attentions: Sequence[AttentionSpec], sequence_length: int) -> FlopsPerToken:
    """Of the layers of one stack, per token."""
    first, layers = attentions[0], len(attentions)
    query_size, key_size = first.heads * first.head_dim, first.kv_heads * first.head_dim
    mlp = (3 if model.mlp.gated else 2) * model.mlp.size
    if model.mlp.experts is not None:
        mlp = mlp * model.mlp.experts.per_token + model.mlp.experts.count
    windows = (min(attention.window or sequence_length, sequence_length) for attention in attentions)
    keys = sum(window - window**2 / (2 * sequence_length) for window in windows)
    if not first.causal:
        keys = float(layers * sequence_length)  # every token attends to the whole sequence
    return FlopsPerToken(
        projections=layers * 2.0 * model.hidden_size * (2 * query_size + 2 * key_size),
        attention=4.0 * query_size * keys,
        mlp=layers * 2.0 * model.hidden_size * mlp,
    )


def _across(model: ModelSpec, encoder: EncoderSpec, source: int, target: int) -> FlopsPerToken:
    """Of the cross attention of all layers, for a whole row."""
    cross = encoder.cross
    query_size, key_size = cross.heads * cross.head_dim, cross.kv_heads * cross.head_dim
    return FlopsPerToken(
        projections=model.layers * 4.0 * model.hidden_size * (target * query_size + source * key_size),
        attention=model.layers * 4.0 * query_size * source * target,
    )


def _head(model: ModelSpec, sequence_length: int) -> float:
    """Dense and output layer of a head; one that reads a single token of a row counts once a row."""
    head, outputs = model.head, model.outputs
    dense = 0 if head.dense is None else model.hidden_size
    rows = sequence_length if head.pool is not None else 1
    return 2.0 * model.hidden_size * (dense + outputs) / rows
