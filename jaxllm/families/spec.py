"""ModelSpec: everything a Transformer of any family is, as data.

A family file turns its Hugging Face config into a ModelSpec and a table of weight rules.  Layers read concepts from the spec
and never a family's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxllm.families.weights import WeightRule

NormKind = Literal["rms", "layer"]
NormPlace = Literal["pre"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class NormSpec:
    """A normalisation over the hidden dimension: root-mean-square (arXiv:1910.07467) or layer norm (arXiv:1607.06450)."""

    kind: NormKind
    eps: float
    place: NormPlace = "pre"


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (arXiv:2104.09864), half-split layout: dimension i pairs with i + head_dim / 2."""

    theta: float


@dataclass(frozen=True)
class AttentionSpec:
    """Self-attention with grouped keys and values (arXiv:2305.13245).

    causal: a token sees nothing later.  window: it sees itself and the `window - 1` tokens before it; None: all of them.
    softcap: scores s become softcap * tanh(s / softcap) before the mask (arXiv:2408.00118); None: they stay.
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


@dataclass(frozen=True)
class MlpSpec:
    """The feed-forward part: `gated` is act(x gate) * (x up) down (arXiv:2002.05202), otherwise act(x up) down."""

    size: int
    activation: Activation
    gated: bool
    bias: bool


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only Transformer.  Sizes in elements; `max_positions` is the longest sequence it may see.

    padding_token: the token whose row of the embedding gets no gradient from the inputs, as torch's `padding_idx` has it.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    max_positions: int
    norm: NormSpec
    attention: AttentionSpec
    mlp: MlpSpec
    rope: RopeSpec | None
    learned_positions: bool
    tie_embeddings: bool
    embedding_dropout: float
    residual_dropout: float
    padding_token: int | None = None

    @property
    def sizes(self) -> Mapping[str, int]:
        """Size of every named axis that a weight rule's pattern may use."""
        return {
            "vocab": self.vocab_size,
            "position": self.max_positions,
            "embed": self.hidden_size,
            "heads": self.attention.heads,
            "kv_heads": self.attention.kv_heads,
            "head_dim": self.attention.head_dim,
            "mlp": self.mlp.size,
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
