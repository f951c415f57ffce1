"""What every section of the run file has in common, and the kinds of numbers that stand in it."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _whole(value: object) -> object:
    """`1e9` is a float in YAML; where a count is wanted it is the whole number it looks like."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Positive: TypeAlias = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
NonNegative: TypeAlias = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Fraction: TypeAlias = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen part of the run file that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)
