"""The Hugging Face config keys that decoders of Llama's kind share, the rules between them, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import ConfigDict, Field, model_validator

from jaxllm.families.keys import ACTIVATIONS, CLASSIFIER_DROPOUT, ActivationName, HuggingFaceKeys, check_pad_token
from jaxllm.families.rope import RopeSpec
from jaxllm.families.rope_keys import RopeParameters, RopeType, read_rope
from jaxllm.families.spec import AttentionSpec, MlpSpec, ModelSpec, NormSpec
from jaxllm.families.tasks import Task, decoder_head

LayerType: TypeAlias = Literal["full_attention", "sliding_attention"]


def _describe_older_spellings(schema: dict[str, Any]) -> None:
    """The JSON Schema tells editors of what `filled_in` reads besides the fields."""
    older = "As in rope_parameters, for configs from before transformers 5."
    schema["properties"]["rope_theta"] = {"type": "number", "exclusiveMinimum": 0, "description": older}
    schema["properties"]["rope_scaling"] = {"anyOf": [{"type": "object"}, {"type": "null"}], "description": older}


class DecoderKeys(HuggingFaceKeys):
    """Keys of every decoder of Llama's kind.  A family overrides defaults, adds its own and fills in what follows.

    ROPE_THETA: what transformers takes for a missing rope_theta.  ROPE_TYPES: the kinds that the family's model computes.
    PARTIAL_ROTARY: whether it may rotate a part of a head only.
    """

    model_config = ConfigDict(json_schema_extra=_describe_older_spellings)

    ROPE_THETA: ClassVar[float] = 10000.0
    ROPE_TYPES: ClassVar[tuple[RopeType, ...]] = get_args(RopeType)
    PARTIAL_ROTARY: ClassVar[bool] = False

    vocab_size: int = Field(32000, ge=1)
    hidden_size: int = Field(4096, ge=1)
    intermediate_size: int = Field(11008, ge=1)
    num_hidden_layers: int = Field(32, ge=1)
    num_attention_heads: int = Field(32, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    max_position_embeddings: int = Field(2048, ge=1)
    initializer_range: float = Field(0.02, gt=0, le=1)
    rms_norm_eps: float = Field(1e-6, ge=0)
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    classifier_dropout: float | None = Field(None, ge=0, lt=1, exclude=True, description=CLASSIFIER_DROPOUT)
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    rope_parameters: RopeParameters = RopeParameters()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: object) -> object:
        """Read older spellings, and fill in what follows from other keys."""
        return cls.filled_in(dict(data)) if isinstance(data, Mapping) else data

    @classmethod
    def filled_in(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """The keys as transformers has them once it has read them."""
        read_rope(keys, cls.ROPE_THETA, cls.given(keys, "max_position_embeddings"), partial=cls.PARTIAL_ROTARY)
        if cls.given(keys, "num_key_value_heads") is None:
            keys["num_key_value_heads"] = cls.given(keys, "num_attention_heads")
        return keys

    @classmethod
    def given(cls, keys: Mapping[str, Any], name: str) -> Any:
        """The value of a key, its default where it is left out."""
        return keys.get(name, cls.model_fields[name].default)

    @property
    def heads_dim(self) -> int:
        """Dimensions of one head."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _sizes_fit(self) -> DecoderKeys:
        if self.hidden_size % self.num_attention_heads and self._heads_divide_hidden:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; "
                "change one of them"
            )
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.num_key_value_heads}; each key/value head serves the same number of query heads"
            )
        check_pad_token(self.pad_token_id, self.vocab_size)
        self._rope_fits()
        return self

    @property
    def _heads_divide_hidden(self) -> bool:
        """Whether the hidden size must be a multiple of the number of heads: where it gives the size of a head."""
        return getattr(self, "head_dim", None) is None

    def _rope_fits(self) -> None:
        self.check_rope(self.rope_parameters)

    def check_rope(self, parameters: RopeParameters) -> None:
        """ValueError unless the family computes rotary positions of this kind."""
        if parameters.rope_type not in self.ROPE_TYPES:
            allowed = ", ".join(f'"{name}"' for name in self.ROPE_TYPES)
            raise ValueError(f'rope_type "{parameters.rope_type}" is not one that the family has; allowed: {allowed}')
        if not self.PARTIAL_ROTARY and parameters.partial_rotary_factor is not None:
            raise ValueError("the family rotates whole heads; remove partial_rotary_factor")
        parameters.check(self.heads_dim)

    @property
    def rope(self) -> RopeSpec:
        """Rotary positions of every layer."""
        return self.rope_parameters.spec(self.max_position_embeddings)

    @property
    def _longest(self) -> int:
        """Tokens of the longest sequence: more than max_position_embeddings where positions are stretched beyond it."""
        return self.rope_parameters.longest(self.max_position_embeddings)

    def attention(self, **more: Any) -> AttentionSpec:
        """What every layer's attention has in common.  more: fields that the family adds or changes."""
        common = {
            "heads": self.num_attention_heads,
            "kv_heads": self.num_key_value_heads,
            "head_dim": self.heads_dim,
            "scale": self.heads_dim**-0.5,
            "qkv_bias": False,
            "output_bias": False,
            "dropout": self.attention_dropout,
        }
        return AttentionSpec(**{**common, **more})

    def model(self, task: Task, attentions: tuple[AttentionSpec, ...], activation: ActivationName, **more: Any) -> ModelSpec:
        """The ModelSpec: gated MLPs, root-mean-square norms and the task's head, and what the family adds or changes."""
        common = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "max_positions": self._longest,
            "norm": NormSpec("rms", self.rms_norm_eps),
            "attentions": attentions,
            "mlp": MlpSpec(self.intermediate_size, ACTIVATIONS[activation], gated=True, bias=False),
            "learned_positions": False,
            "tie_embeddings": self.tie_word_embeddings,
            "padding_token": self.pad_token_id,
            "head": decoder_head(task, self.pad_token_id, self.classifier_dropout),
        }
        return ModelSpec(**{**common, **more})


def fill_in_head_dim(cls: type[DecoderKeys], keys: dict[str, Any]) -> None:
    """A missing head_dim follows from the hidden size and the number of heads."""
    heads, hidden_size = cls.given(keys, "num_attention_heads"), cls.given(keys, "hidden_size")
    if cls.given(keys, "head_dim") is None and type(heads) is int and type(hidden_size) is int and 0 < heads <= hidden_size:
        keys["head_dim"] = hidden_size // heads


def by_layer_type(
    types: Sequence[LayerType], attention: AttentionSpec, window: int | None, sliding_rope: RopeSpec | None = None
) -> tuple[AttentionSpec, ...]:
    """The attention of every layer.  sliding_rope: of layers with a window, where theirs differ from the others'."""
    sliding = replace(attention, window=window, rope=sliding_rope or attention.rope)
    return tuple(sliding if name == "sliding_attention" else attention for name in types)


def check_layer_types(keys: Any) -> None:
    """ValueError unless there is a type for every layer, and a window where a layer wants one."""
    if len(keys.layer_types) != keys.num_hidden_layers:
        raise ValueError(f"layer_types names {len(keys.layer_types)} layers, num_hidden_layers is {keys.num_hidden_layers}")
    if "sliding_attention" in keys.layer_types and keys.sliding_window is None:
        raise ValueError("layer_types has sliding_attention, but sliding_window is null; give the window's size")
