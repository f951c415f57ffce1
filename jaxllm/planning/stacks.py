"""The stacks of layers of a model, as far as memory depends on them: one, or an encoder's and a decoder's."""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.families.spec import AttentionSpec, ModelSpec
from jaxllm.families.weights import WeightRule
from jaxllm.planning.setting import Setting


@dataclass(frozen=True)
class Stack:
    """Layers that all see the same tokens.

    tokens: of a micro-batch on one device.  length: of a row.  source: length of the rows that each layer attends to besides,
    if it does.
    """

    attention: AttentionSpec
    layers: int
    tokens: float
    length: int
    source: int | None = None
    is_encoder: bool = False

    def holds(self, rule: WeightRule) -> bool:
        """Whether a weight is one of its layers'."""
        return bool(rule.layers) and all(path.startswith("encoder.") == self.is_encoder for path in rule.paths)


def stacks_of(spec: ModelSpec, setting: Setting) -> tuple[Stack, ...]:
    """In forward order."""
    own = Stack(spec.attention, spec.layers, float(setting.tokens), setting.target or setting.sequence)
    if spec.encoder is None:
        return (own,)
    source = float(setting.source_tokens)
    encoder = Stack(spec.encoder.attentions[0], len(spec.encoder.attentions), source, setting.sequence, None, True)
    return encoder, Stack(own.attention, own.layers, own.tokens, own.length, setting.sequence)
