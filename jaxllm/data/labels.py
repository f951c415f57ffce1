"""Labels as they stand in a source, to numbers.

A label is written as its name or as its number; in columns of plain text, several are separated by spaces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxllm.config.messages import closest
from jaxllm.config.objective import LabelledObjective, TokenClassificationObjective


@dataclass(frozen=True)
class LabelReader:
    """Reads the labels of one example for an objective; ValueError with what is wrong, as the end of a sentence."""

    objective: LabelledObjective
    field: str

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        return {name: number for number, name in enumerate(self.objective.names)}

    def read(self, value: object, words: int) -> tuple[float, ...]:
        """Numbers of the labels, or the values of a regression.  words: of the example, where every word has a label."""
        objective = self.objective
        if isinstance(objective, TokenClassificationObjective):
            labels = tuple(self._number(each) for each in self._list(value))
            if len(labels) != words:
                raise ValueError(f"has {words} words but {len(labels)} labels in {self.field!r}")
            return labels
        if objective.problem_type == "regression":
            return self._values(value)
        if objective.problem_type == "multi_label_classification":
            return tuple(sorted({self._number(each) for each in self._list(value)}))
        return (self._number(value),)

    def _list(self, value: object) -> list[object]:
        if isinstance(value, str):
            return list(value.split())
        if not isinstance(value, list):
            raise ValueError(f"has {type(value).__name__} in {self.field!r}, not a list of labels")  # noqa: TRY004 - the data's
        return value

    def _number(self, value: object) -> int:
        names = self.objective.names
        if isinstance(value, str):
            known = self._numbers.get(value.strip())
            if known is not None:
                return known
            if not value.strip().isdecimal():
                raise ValueError(f"has the label {value!r} in {self.field!r}, which is unknown{self._hint(value)}")
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"has {type(value).__name__} in {self.field!r}, not a label")  # noqa: TRY004
        if not 0 <= value < len(names):
            raise ValueError(f"has the label {value} in {self.field!r}, outside 0 to {len(names) - 1}")
        return value

    def _hint(self, value: str) -> str:
        close = closest(value, self.objective.names)
        listed = ", ".join(self.objective.names[:10]) + (", ..." if len(self.objective.names) > 10 else "")
        return f"; did you mean {close!r}? (labels: {listed})" if close else f" (labels: {listed})"

    def _values(self, value: object) -> tuple[float, ...]:
        values: list[Any] = value if isinstance(value, list) else value.split() if isinstance(value, str) else [value]
        try:
            numbers = tuple(float(each) for each in values)
        except (TypeError, ValueError):
            raise ValueError(f"has {value!r} in {self.field!r}, which is not a number") from None
        wanted = len(self.objective.names)
        if len(numbers) != wanted or not all(map(math.isfinite, numbers)):
            raise ValueError(f"has {value!r} in {self.field!r} instead of {wanted} finite number{'s' if wanted > 1 else ''}")
        return numbers
