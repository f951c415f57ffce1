"""What the routers of a transformers mixture of experts do with a batch, and their load-balancing loss.

B sequences, S tokens, X experts, K experts per token.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from jaxllm.families import Model
from jaxllm.metrics.routing import BALANCE_LOSS, ENTROPY, LARGEST_LOAD, SMALLEST_LOAD
from jaxllm.torch_backend.group import Group


class Routing:
    """Records the router logits of every layer of one forward pass of `module` (a transformers.PreTrainedModel)."""

    def __init__(self, model: Model, module: Any) -> None:
        experts = model.spec.mlp.experts
        assert experts is not None  # noqa: S101 - asked by `attach_routing`
        self._experts = experts
        self._logits: list[torch.Tensor] = []
        # transformers' own function, which every family has beside its model.
        self._balance_loss = sys.modules[type(module).__module__].load_balancing_loss_func
        module.register_forward_pre_hook(lambda *_: self._logits.clear())
        for layer in range(model.spec.layers):
            router = module.get_submodule(f"model.layers.{layer}.mlp.gate")
            router.register_forward_hook(lambda _, __, output: self._logits.append(output[0]))
        self._layers = model.spec.layers
        self._sums: torch.Tensor | None = None

    def loss(self, counts_BS: torch.Tensor) -> torch.Tensor | float:
        """The coefficient times the load-balancing loss of the forward pass just done.  counts_BS: tokens but padding.

        It is transformers' own, over all layers at once.  0 where the model does not train on it.  The pass is also added to
        what `statistics` reports.
        """
        logits = tuple(self._logits[: self._layers])  # activation checkpointing runs the layers once more, later
        self._observe(logits, counts_BS)
        if not self._experts.balance:
            return 0.0
        loss: torch.Tensor = self._balance_loss(logits, self._experts.count, self._experts.per_token, counts_BS)
        return self._experts.balance * loss

    @torch.no_grad()
    def _observe(self, logits: tuple[torch.Tensor, ...], counts_BS: torch.Tensor) -> None:
        """Add up per expert how often it was chosen and its probability, then entropy and number of tokens: (2 X + 2,)."""
        count = self._experts.count
        sums = torch.zeros(2 * count + 2, dtype=torch.float64, device=counts_BS.device)
        real_T = counts_BS.reshape(-1).to(torch.float64)
        for logits_TX in logits:
            probabilities_TX = torch.softmax(logits_TX.to(torch.float64), dim=-1)
            chosen_TK = torch.topk(probabilities_TX, self._experts.per_token, dim=-1).indices
            sums[:count].index_add_(0, chosen_TK.reshape(-1), real_T.repeat_interleave(self._experts.per_token))
            sums[count : 2 * count] += (probabilities_TX * real_T[:, None]).sum(0)
            sums[-2] -= (torch.special.xlogy(probabilities_TX, probabilities_TX).sum(-1) * real_T).sum()
            sums[-1] += real_T.sum()
        self._sums = sums if self._sums is None else self._sums + sums

    def statistics(self, group: Group) -> Mapping[str, float]:
        """Of every pass since the last call, over all processes (collective), by the names of `jaxllm.metrics.routing`."""
        if self._sums is None:
            return {}
        sums, self._sums = group.sum(self._sums), None
        count = self._experts.count
        chosen, probability, (entropy, tokens) = sums[:count], sums[count : 2 * count], sums[-2:].clamp(min=0).tolist()
        tokens = max(tokens, 1.0)
        loads = chosen / chosen.sum().clamp(min=1.0) * count
        return {
            BALANCE_LOSS: float((chosen * probability).sum()) / tokens**2 * count,
            LARGEST_LOAD: float(loads.max()),
            SMALLEST_LOAD: float(loads.min()),
            ENTROPY: entropy / tokens,
        }


def attach_routing(model: Model, module: Any) -> None:
    """Give `module` a `routing`: what its routers do, None where it has none."""
    module.routing = None if model.spec.mlp.experts is None else Routing(model, module)
