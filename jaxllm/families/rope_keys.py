"""`rope_parameters`, the Hugging Face config keys of rotary positions, and the older spellings of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from jaxllm.families.keys import HuggingFaceKeys
from jaxllm.families.rope import DynamicNtk, Linear, Llama3, LongRope, RopeSpec, Yarn

RopeType: TypeAlias = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]

# Keys of each kind beside rope_theta and rope_type: what it needs, and what it may have.
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_TAKES: Mapping[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
}
_ALWAYS = ("rope_theta", "rope_type", "partial_rotary_factor")


class RopeParameters(HuggingFaceKeys):
    """Rotary position embedding.  Keys that are null are as if they were left out."""

    rope_theta: float = Field(10000.0, gt=0)
    rope_type: RopeType = "default"
    factor: float | None = Field(None, ge=1)
    original_max_position_embeddings: int | None = Field(None, ge=1)
    attention_factor: float | None = Field(None, gt=0)
    beta_fast: float | None = Field(None, gt=0)
    beta_slow: float | None = Field(None, gt=0)
    mscale: float | None = Field(None, ge=0)
    mscale_all_dim: float | None = Field(None, ge=0)
    truncate: bool | None = None
    short_factor: list[float] | None = None
    long_factor: list[float] | None = None
    low_freq_factor: float | None = Field(None, gt=0)
    high_freq_factor: float | None = Field(None, gt=0)
    partial_rotary_factor: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> RopeParameters:
        needs, takes = _NEEDS[self.rope_type], _TAKES.get(self.rope_type, ())
        given = {name for name, value in self if value is not None}
        for name in needs:
            if name not in given:
                raise ValueError(f'rope_type "{self.rope_type}" needs {name}')
        for name in sorted(given - {*needs, *takes, *_ALWAYS}):
            allowed = ", ".join(sorted((*needs, *takes, "rope_theta")))
            raise ValueError(f'{name} says nothing with rope_type "{self.rope_type}", which takes {allowed}; remove it')
        if self.low_freq_factor is not None and self.low_freq_factor == self.high_freq_factor:
            raise ValueError("low_freq_factor and high_freq_factor are equal; llama3 blends what lies between them")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_null(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value is not None}

    def spec(self, max_positions: int) -> RopeSpec:
        """The RopeSpec.  max_positions: the config's max_position_embeddings."""
        fraction = 1.0 if self.partial_rotary_factor is None else self.partial_rotary_factor
        return RopeSpec(self.rope_theta, self._scaling(max_positions), fraction)

    def longest(self, max_positions: int) -> int:
        """Tokens of the longest sequence: more than max_position_embeddings where the kind goes beyond it."""
        if self.rope_type not in ("dynamic", "yarn"):
            return max_positions
        return max(max_positions, int((self.factor or 1.0) * (self.original_max_position_embeddings or max_positions)))

    def check(self, head_dim: int) -> None:
        """ValueError unless the kind can rotate heads of `head_dim` dimensions."""
        rotated = int(head_dim * (self.partial_rotary_factor or 1.0))
        if rotated % 2 or not rotated:
            what = f"head_dim {head_dim}" if rotated == head_dim else f"the rotated part of head_dim, {rotated} dimensions,"
            raise ValueError(f"{what} is odd; rotary positions pair its dimensions")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != rotated // 2:
                raise ValueError(
                    f"{name} has {len(factors)} numbers; heads that rotate {rotated} dimensions need {rotated // 2}"
                )
        if self.rope_type == "dynamic" and rotated < 4:
            raise ValueError(f'rope_type "dynamic" needs at least 4 rotated dimensions of a head, not {rotated}')

    def _scaling(self, max_positions: int) -> Linear | DynamicNtk | Llama3 | Yarn | LongRope | None:
        factor, original = self.factor or 1.0, self.original_max_position_embeddings or max_positions
        if self.rope_type == "linear":
            return Linear(factor)
        if self.rope_type == "dynamic":
            return DynamicNtk(factor, max_positions)
        if self.rope_type == "llama3":
            return Llama3(factor, self.low_freq_factor or 1.0, self.high_freq_factor or 1.0, original)
        if self.rope_type == "yarn":
            fast, slow = self.beta_fast or 32.0, self.beta_slow or 1.0
            return Yarn(factor, original, self._yarn_attention_factor(), fast, slow, self.truncate in (None, True))
        if self.rope_type == "longrope":
            stretch = self.factor or max_positions / original
            attention_factor = self.attention_factor or (
                1.0 if stretch <= 1.0 else math.sqrt(1 + math.log(stretch) / math.log(original))
            )
            return LongRope(tuple(self.short_factor or ()), tuple(self.long_factor or ()), original, attention_factor)
        return None

    def _yarn_attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        stretch = 0.1 * math.log(self.factor or 1.0)
        if self.mscale and self.mscale_all_dim:
            return (self.mscale * stretch + 1.0) / (self.mscale_all_dim * stretch + 1.0)
        return stretch + 1.0


def read_rope(keys: dict[str, Any], default_theta: float, max_positions: object, *, partial: bool = False) -> None:
    """Bring the keys of rotary positions into the form of transformers 5: one `rope_parameters` with every default in it.

    Before, there were `rope_theta` and `rope_scaling` (with `type` for `rope_type`) beside each other.  partial: whether the
    family rotates a part of a head, as `partial_rotary_factor` says.
    """
    scaling, given = keys.pop("rope_scaling", None), keys.pop("rope_parameters", None)
    chosen = scaling or given or {}
    if not isinstance(chosen, Mapping):
        keys["rope_parameters"] = chosen if isinstance(chosen, RopeParameters) else scaling or given
        return
    parameters = dict(chosen)
    kind = parameters.pop("type", None)
    parameters.setdefault("rope_type", "default" if kind is None else kind)
    theta = keys.pop("rope_theta", None)
    parameters.setdefault("rope_theta", default_theta if theta is None else theta)
    if partial:
        parameters.setdefault("partial_rotary_factor", keys.pop("partial_rotary_factor", 1.0))
    if "original_max_position_embeddings" in _NEEDS.get(str(parameters["rope_type"]), ()):
        parameters.setdefault("original_max_position_embeddings", max_positions)
    keys["rope_parameters"] = parameters
