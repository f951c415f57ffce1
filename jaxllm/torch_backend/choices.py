"""Which experts the routers of a transformers model choose: recorded, or imposed from outside.

Shape legend: B sequences, S tokens, X experts, K experts per token, T tokens of one forward pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from jaxllm.families import Model, module_points
from jaxllm.families.spec import ExpertsSpec
from jaxllm.probe import Choices

Parts = dict[str, list[torch.Tensor]]


class Recorded:
    """Router logits and chosen experts of every forward pass, by point."""

    def __init__(self) -> None:
        self._logits: Parts = defaultdict(list)
        self._chosen: Parts = defaultdict(list)

    def add(self, point: str, logits_TX: torch.Tensor, chosen_TK: torch.Tensor) -> None:
        """Of one forward pass."""
        self._logits[point].append(logits_TX.detach())
        self._chosen[point].append(chosen_TK)

    def tokens(self, point: str) -> int:
        """How many tokens this router has seen."""
        return sum(len(part) for part in self._chosen[point])

    def logits(self, point: str) -> torch.Tensor:
        """(T, X) of all passes."""
        return torch.cat(self._logits[point])

    def chosen(self, point: str) -> torch.Tensor:
        """(T, K) of all passes."""
        return torch.cat(self._chosen[point])

    def points(self) -> list[str]:
        """In forward order."""
        return list(self._logits)


@contextmanager
def choices(model: Model, module: Any, imposed: Mapping[str, Choices] | None = None) -> Iterator[Recorded]:
    """Within it the routers of `module` (a transformers.PreTrainedModel) are recorded.

    imposed: by point, what its router chooses instead; recorded is what it would have chosen by itself.  The weights are
    then those that it gives the imposed experts.
    """
    recorded = Recorded()
    routers = {point: place for point, place in module_points(model).items() if point.endswith(".router")}
    with ExitStack() as stack:
        for point, place in routers.items():
            given = None if imposed is None else torch.from_numpy(imposed[point].chosen).flatten(0, 1)
            hook = _hook(recorded, point, model.spec.mlp.experts, given)
            # Before those that read what the router gave.
            stack.callback(module.get_submodule(place.module).register_forward_hook(hook, prepend=True).remove)
        yield recorded


def _hook(recorded: Recorded, point: str, spec: ExpertsSpec | None, given: torch.Tensor | None) -> Any:
    assert spec is not None  # noqa: S101 - there is a router

    def after(_: Any, __: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Any:
        logits_TX, _, chosen_TK = output
        start = recorded.tokens(point)
        recorded.add(point, logits_TX, chosen_TK)
        if given is None:
            return None
        forced_TK = given[start : start + len(logits_TX)].to(chosen_TK)
        return logits_TX, _weights(spec, logits_TX, forced_TK), forced_TK

    return after


def _weights(spec: ExpertsSpec, logits_TX: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
    """What a router gives the experts it has chosen."""
    probabilities_TX = torch.softmax(logits_TX.to(torch.promote_types(logits_TX.dtype, torch.float32)), dim=-1)
    weights_TK = probabilities_TX.gather(-1, chosen_TK)
    if spec.normalised:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK.to(logits_TX.dtype) if spec.rounds_weights else weights_TK
