"""Finds operations of torch that leave float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Spy(TorchDispatchMode):
    """Counts the operations that yield less than float64."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.lower: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.seen += 1
        for leaf in _pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float32, torch.bfloat16, torch.float16):
                self.lower[str(func)] += 1
        return output
