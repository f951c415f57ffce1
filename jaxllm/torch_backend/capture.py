"""Activations of an unmodified transformers model, and their gradients, recorded while it runs.

Shape legend: B sequences, S tokens, H heads (of queries, or of keys and values), D head_dim.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from jaxllm.families import ModulePoint

_OF_ATTENTION = ("query", "key", "value")


class Recording:
    """Tensors by point, in the order in which they were computed; one of each for every forward pass.

    gradients: whether to keep the gradients too, and with them the graph that they come through.
    """

    def __init__(self, *, gradients: bool) -> None:
        self._gradients = gradients
        self._tensors: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._heads_first: set[str] = set()

    def add(self, point: str, tensor: torch.Tensor, *, heads_first: bool = False) -> None:
        """heads_first: the tensor is (B, H, S, D), as transformers' attention functions take it."""
        if self._gradients:
            tensor.retain_grad()
        self._tensors[point].append(tensor if self._gradients else tensor.detach())
        if heads_first:
            self._heads_first.add(point)

    def values(self) -> dict[str, torch.Tensor]:
        """What was recorded, over the rows of all passes: (B, S, ...)."""
        return {point: self._joined(point, [tensor.detach() for tensor in parts]) for point, parts in self._tensors.items()}

    def cotangents(self) -> dict[str, torch.Tensor]:
        """The gradients with respect to `values`, once the backward passes are done."""
        gradients = {
            point: [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in parts]
            for point, parts in self._tensors.items()
        }
        return {point: self._joined(point, parts) for point, parts in gradients.items()}

    def _joined(self, point: str, parts: list[torch.Tensor]) -> torch.Tensor:
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return whole.transpose(1, 2) if point in self._heads_first else whole


@contextmanager
def capture(model: Any, points: Mapping[str, ModulePoint], *, gradients: bool) -> Iterator[Recording]:
    """Record the tensor at every point of `points` whenever `model` (a transformers.PreTrainedModel) runs within."""
    recording = Recording(gradients=gradients)
    attention: dict[nn.Module, dict[str, str]] = defaultdict(dict)
    with ExitStack() as stack:
        for point, place in points.items():
            module = model.get_submodule(place.module)
            if place.side in _OF_ATTENTION:
                attention[module][place.side] = point
            else:
                stack.callback(_hook(module, place, point, recording).remove)
        if attention:
            stack.enter_context(_attention_function(model, attention, recording))
        yield recording


def _hook(module: nn.Module, place: ModulePoint, point: str, recording: Recording) -> Any:
    """Record the first tensor that goes into a module, or comes out of it."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.add(point, args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        recording.add(point, output if isinstance(output, torch.Tensor) else output[0])

    if place.side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


@contextmanager
def _attention_function(model: Any, points: Mapping[nn.Module, Mapping[str, str]], recording: Recording) -> Iterator[None]:
    """Within it, the attention function that the model's modules call records what it is given, then does its work.

    points: of each attention module, by side.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kernel = model.config._attn_implementation  # noqa: SLF001 - there is no public name for it
    registered = ALL_ATTENTION_FUNCTIONS.get(kernel)

    def record(module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        given = {"query": query, "key": key, "value": value}
        for side, point in points.get(module, {}).items():
            recording.add(point, given[side], heads_first=True)
        # `eager` is in no registry: every modeling file has its own.
        attend = registered or sys.modules[type(module).__module__].eager_attention_forward
        return attend(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[kernel] = record  # before the library's own entry, which comes back when this one is taken out
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.pop(kernel)
