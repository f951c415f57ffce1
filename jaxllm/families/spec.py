"""ModelSpec: everything a Transformer of any family is, as data.

A family file turns its Hugging Face config into a ModelSpec and a table of weight rules.  Layers read concepts from the spec
and never a family's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxllm.families.rope import RopeSpec
from jaxllm.families.weights import WeightRule

NormKind = Literal["rms", "layer"]
NormPlace = Literal["pre", "output", "sandwich", "post"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "tanh"]
HeadKind = Literal["causal-lm", "masked-lm", "sequence-classification", "token-classification", "seq2seq"]
LossKind = Literal["cross-entropy", "binary-cross-entropy", "squared-error"]
Pool = Literal["first", "last"]


@dataclass(frozen=True)
class NormSpec:
    """A normalisation over the hidden dimension: root-mean-square (arXiv:1910.07467) or layer norm (arXiv:1607.06450).

    place: `pre` x + f(norm(x)), `output` x + norm(f(x)) (arXiv:2501.00656), `sandwich` x + norm(f(norm(x))) (arXiv:2408.00118),
    `post` norm(x + f(x)) (arXiv:1706.03762), f being attention or MLP.  unit_offset: the stored scale is what is added to 1.
    rounds_late: a root-mean-square norm rounds to the compute dtype after it has multiplied by the scale, not before; a layer
    norm always does.
    """

    kind: NormKind
    eps: float
    place: NormPlace = "pre"
    unit_offset: bool = False
    rounds_late: bool = False

    @property
    def before(self) -> bool:
        """Whether attention and MLP read a normalised input."""
        return self.place in ("pre", "sandwich")

    @property
    def after(self) -> bool:
        """Whether the outputs of attention and MLP are normalised."""
        return self.place in ("output", "sandwich")

    @property
    def of_residual(self) -> bool:
        """Whether the residual stream itself is normalised, after every sum."""
        return self.place == "post"


@dataclass(frozen=True)
class RelativeSpec:
    """A learned number for each head and kind of distance, added to scores (arXiv:1910.10683, section 2.1).

    buckets: kinds of distances: half of them for one distance each, the others for ranges that grow up to `max_distance`,
    beyond which all are alike.  Without a causal mask each direction has half of the buckets.
    """

    buckets: int
    max_distance: int


@dataclass(frozen=True)
class AttentionSpec:
    """Attention with grouped keys and values (arXiv:2305.13245).

    causal: a token sees nothing later.  window: it sees itself and the `window - 1` tokens before it; None: all of them.
    softcap: scores s become softcap * tanh(s / softcap) before the mask (arXiv:2408.00118); None: they stay.
    rope: rotary positions, if there are any.  query_key_norm: queries and keys are normalised before they are rotated, each
    head by itself with one scale for all of them, or over all heads together.  relative: biases of distances, if there are
    any; all layers of a stack share one table.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool
    output_bias: bool
    dropout: float = 0.0
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    rope: RopeSpec | None = None
    query_key_norm: Literal["head", "all_heads"] | None = None
    relative: RelativeSpec | None = None


@dataclass(frozen=True)
class ExpertsSpec:
    """Many MLPs of which each token takes the `per_token` that a router gives the most weight; none is ever left out.

    normalised: the chosen weights are divided by their sum.  rounds_weights: they are rounded to the compute dtype before the
    experts' outputs are multiplied by them.  balance: what the load-balancing loss (arXiv:2101.03961, equations 4 to 6) is
    multiplied by in the loss that is trained on; 0: it is only reported.
    """

    count: int
    per_token: int
    normalised: bool
    rounds_weights: bool
    balance: float


@dataclass(frozen=True)
class MlpSpec:
    """The feed-forward part: `gated` is act(x gate) * (x up) down (arXiv:2002.05202), otherwise act(x up) down.

    experts: there are many of them, of this size each, behind a router.  dropout: of what `down` reads.
    """

    size: int
    activation: Activation
    gated: bool
    bias: bool
    experts: ExpertsSpec | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class HeadSpec:
    """What makes outputs of the last hidden states.

    outputs: how many, for each token or, with `pool`, for the token that stands for its row: the first, or the last that is
    not `padding`, the token that fills rows up.  loss: how they are compared with the targets.  dense: activation of a dense
    layer before the output layer; a masked language model has a norm behind it.  bias: whether the output layer of a
    classification has one.  dropout: before it, and with `dropout_before_dense` before the dense layer too.
    """

    kind: HeadKind = "causal-lm"
    outputs: int = 0
    loss: LossKind = "cross-entropy"
    dense: Activation | None = None
    dropout: float = 0.0
    dropout_before_dense: bool = False
    bias: bool = True
    pool: Pool | None = None
    padding: int | None = None


@dataclass(frozen=True)
class EncoderSpec:
    """The stack that reads the source of an encoder-decoder; norms, MLP and sizes are those of the decoder.

    attentions: of its layers.  cross: how every layer of the decoder attends to what comes out of it.
    """

    attentions: tuple[AttentionSpec, ...]
    cross: AttentionSpec


UNLIMITED_POSITIONS = 2**31 - 1
"""`max_positions` of a model that knows distances only: what an int32 position can count."""


@dataclass(frozen=True)
class ModelSpec:
    """A Transformer of one stack, or of two.  Sizes in elements; `max_positions` is the longest sequence it may see.

    attentions: of every layer.  They may differ in what has no weights: window and rotary positions.  encoder: the other stack
    of an encoder-decoder; all else that is said of layers is said of both.
    embedding_scale: what token embeddings are multiplied by, once it is rounded to the dtype of the weights.
    final_dropout: of the last hidden states of each stack.  head_scale: what they are multiplied by before the head.
    final_softcap: logits l become final_softcap * tanh(l / final_softcap).
    token_types: kinds of text that have an embedding of their own (the two of a pair).  position_offset: what is added to
    positions before they are looked up.  A model with norm place `post` has a norm behind its embeddings and none at its end.
    padding_token: the token whose row of the embedding gets no gradient from the inputs, as torch's `padding_idx` has it.
    """

    vocab_size: int
    hidden_size: int
    max_positions: int
    norm: NormSpec
    attentions: tuple[AttentionSpec, ...]
    mlp: MlpSpec
    learned_positions: bool
    tie_embeddings: bool
    encoder: EncoderSpec | None = None
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0
    final_dropout: float = 0.0
    embedding_scale: float | None = None
    head_scale: float | None = None
    final_softcap: float | None = None
    padding_token: int | None = None
    token_types: int = 0
    position_offset: int = 0
    head: HeadSpec = HeadSpec()

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.attentions)

    @property
    def attention(self) -> AttentionSpec:
        """The first layer's: what all layers have in common, and more."""
        return self.attentions[0]

    @property
    def outputs(self) -> int:
        """How many numbers the head makes of a hidden state: one for every entry of the vocabulary, or every label."""
        return self.head.outputs or self.vocab_size

    @property
    def has_dropout(self) -> bool:
        """Whether training drops anything out."""
        return self != self.without_dropout()

    def without_dropout(self) -> ModelSpec:
        """The same model, evaluated."""
        whole = replace(
            self,
            embedding_dropout=0.0,
            residual_dropout=0.0,
            final_dropout=0.0,
            mlp=replace(self.mlp, dropout=0.0),
            head=replace(self.head, dropout=0.0),
        )
        return whole.with_attention(dropout=0.0)

    def with_attention(self, **changes: Any) -> ModelSpec:
        """The same model with fields of every attention changed."""

        def changed(attentions: tuple[AttentionSpec, ...]) -> tuple[AttentionSpec, ...]:
            return tuple(replace(attention, **changes) for attention in attentions)

        encoder = self.encoder
        if encoder is not None:
            encoder = EncoderSpec(changed(encoder.attentions), *changed((encoder.cross,)))
        return replace(self, attentions=changed(self.attentions), encoder=encoder)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Size of every named axis that a weight rule's pattern may use."""
        return {
            "vocab": self.vocab_size,
            "position": self.max_positions + self.position_offset,
            "embed": self.hidden_size,
            "embed_out": self.hidden_size,
            "token_type": self.token_types,
            "label": self.head.outputs,
            "heads": self.attention.heads,
            "kv_heads": self.attention.kv_heads,
            "head_dim": self.attention.head_dim,
            "mlp": self.mlp.size,
            "experts": self.mlp.experts.count if self.mlp.experts else 0,
            "router": self.mlp.experts.count if self.mlp.experts else 0,
            "buckets": self.attention.relative.buckets if self.attention.relative else 0,
            "two": 2,
            "three": 3,
        }


@dataclass(frozen=True)
class Model:
    """A family's config made definite: the spec, every weight, and the Hugging Face config.json that describes it."""

    family: str
    spec: ModelSpec
    rules: tuple[WeightRule, ...]
    huggingface_config: Mapping[str, object]
    pretrained: str | None = None  # folder whose weights the run starts from

    @property
    def parameters(self) -> int:
        """Number of parameters, tied weights counted once."""
        return sum(weight.parameters for weight in self.rules)
