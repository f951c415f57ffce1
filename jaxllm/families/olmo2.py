"""OLMo 2 (arXiv:2501.00656): norms after attention and MLP instead of before, and of queries and keys over all heads."""

from __future__ import annotations

from pydantic import Field

from jaxllm.families import decoder
from jaxllm.families.decoder_keys import DecoderKeys
from jaxllm.families.keys import ActivationName
from jaxllm.families.spec import ModelSpec, NormSpec
from jaxllm.families.tasks import Task
from jaxllm.families.weights import WeightRule

ARCHITECTURES = decoder.architectures("Olmo2", words=False)
BASE_PREFIX = decoder.BASE_PREFIX
MAX_POSITIONS_KEY = "max_position_embeddings"
POINTS = decoder.decoder_points(decoder.OUTPUT_NORMS)


class Keys(DecoderKeys):
    """transformers.Olmo2Config."""

    vocab_size: int = Field(50304, ge=1)
    hidden_act: ActivationName = "silu"
    rms_norm_eps: float = Field(1e-5, ge=0)
    pad_token_id: int | None = 1
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 50279
    attention_bias: bool = False


def spec(keys: Keys, task: Task) -> ModelSpec:
    """The ModelSpec of an OLMo 2 config, with the task's head."""
    bias = keys.attention_bias
    attention = keys.attention(rope=keys.rope, query_key_norm="all_heads", qkv_bias=bias, output_bias=bias)
    norm = NormSpec("rms", keys.rms_norm_eps, "output", rounds_late=True)
    return keys.model(task, (attention,) * keys.num_hidden_layers, keys.hidden_act, norm=norm)


def rules(keys: Keys, task: Task) -> tuple[WeightRule, ...]:
    """Every weight of an OLMo 2 model, in checkpoint order."""
    return decoder.decoder_rules(spec(keys, task), keys.initializer_range, decoder.OUTPUT_NORMS)
