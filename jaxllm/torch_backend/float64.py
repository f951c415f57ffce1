"""The true float64 reference: a transformers model with every operation in float64.

Stock modelling code drops to float32 inside (norm statistics, rotary angles, softmax), so that `model.double()` alone is
exact to 1e-7 only.  Here every float32 that the code asks for becomes float64, without touching the code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def _widened(value: object) -> object:
    return torch.float64 if value is torch.float32 else value


class _Widen(TorchFunctionMode):
    """Answers every request for float32 with float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(_widened, args), **{key: _widened(value) for key, value in (kwargs or {}).items()})


@contextmanager
def true_float64() -> Iterator[None]:
    """Within it, torch code computes in float64 throughout: new tensors, casts and downcasts alike."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widen():
            yield
    finally:
        torch.set_default_dtype(default)
