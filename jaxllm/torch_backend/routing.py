"""What the routers of a transformers mixture of experts do with a batch, and their load-balancing loss.

B sequences, S tokens, X experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from jaxllm.families import Model
from jaxllm.metrics.routing import BALANCE_LOSS, ENTROPY, LARGEST_LOAD, SMALLEST_LOAD
from jaxllm.torch_backend.mesh import Mesh


class Routing:
    """Records the router logits of every layer of one forward pass of `module` (a transformers.PreTrainedModel)."""

    def __init__(self, model: Model, module: Any) -> None:
        experts = model.spec.mlp.experts
        assert experts is not None  # noqa: S101 - asked by `attach_routing`
        self._experts = experts
        self._layers = model.spec.layers
        self._decided: list[tuple[torch.Tensor, torch.Tensor]] = []  # (T, X) logits and (T, K) chosen experts
        self._sums: torch.Tensor | None = None
        module.register_forward_pre_hook(lambda *_: self._decided.clear())
        for layer in range(self._layers):
            router = module.get_submodule(f"model.layers.{layer}.mlp.gate")
            router.register_forward_hook(lambda _, __, output: self._decided.append((output[0], output[2])))

    @property
    def logits(self) -> tuple[torch.Tensor, ...]:
        """(T, X) of every layer, of the forward pass just done."""
        return tuple(logits for logits, _ in self._of_layers)

    @property
    def _of_layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self._decided[: self._layers]  # activation checkpointing runs the layers once more, later

    def loss_sum(self, real_BS: torch.Tensor, target_tokens: torch.Tensor, mesh: Mesh) -> torch.Tensor | float:
        """This process's part of the coefficient times the load-balancing loss times target tokens (collective).

        The loss is that of the whole micro-batch, over all processes, layers and tokens but padding (real_BS tells which are
        real), as transformers takes it of a batch: X sum_x (share of tokens that chose x) (mean probability of x).  The shares
        are summed up over processes first; what is left is a sum over tokens.  target_tokens: of this process.
        """
        if not self._experts.balance:
            return 0.0
        mask_T1 = real_BS.reshape(-1, 1)
        probabilities = [torch.softmax(each.to(torch.promote_types(each.dtype, torch.float32)), -1) for each in self.logits]
        probability_X = torch.stack([(each * mask_T1).sum(0) for each in probabilities]).sum(0)
        chosen_X = torch.stack([self._counts(chosen_TK, real_BS) for _, chosen_TK in self._of_layers]).sum(0)
        chosen_X, decisions, targets = self._reduced(chosen_X, real_BS, target_tokens, mesh)
        factor_X = self._experts.balance * self._experts.count * chosen_X * targets / decisions**2
        return (factor_X.to(probability_X.dtype) * probability_X).sum()

    def _counts(self, chosen_TK: torch.Tensor, real_BS: torch.Tensor) -> torch.Tensor:
        """(X,) how many real tokens chose each expert."""
        counts_X = torch.zeros(self._experts.count, dtype=torch.float64, device=real_BS.device)
        weights_A = real_BS.reshape(-1).double().repeat_interleave(self._experts.per_token)
        return counts_X.index_add_(0, chosen_TK.reshape(-1), weights_A)

    def _reduced(
        self, chosen_X: torch.Tensor, real_BS: torch.Tensor, target_tokens: torch.Tensor, mesh: Mesh
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Over all processes: choices, decisions (tokens x layers) and target tokens."""
        decisions = real_BS.double().sum() * self._layers
        sums = mesh.sum(torch.cat([chosen_X, torch.stack([decisions, target_tokens.detach().double()])]))
        return sums[:-2], sums[-2].clamp(min=1.0), sums[-1]

    @torch.no_grad()
    def observe(self, real_BS: torch.Tensor) -> None:
        """Add the forward pass just done to what `statistics` reports.

        Per expert how often it was chosen and its probability, then entropy and number of decisions: (2 X + 2,).
        """
        count = self._experts.count
        sums = torch.zeros(2 * count + 2, dtype=torch.float64, device=real_BS.device)
        real_T = real_BS.reshape(-1).double()
        for logits_TX, chosen_TK in self._of_layers:
            probabilities_TX = torch.softmax(logits_TX.double(), dim=-1)
            sums[:count] += self._counts(chosen_TK, real_BS)
            sums[count : 2 * count] += (probabilities_TX * real_T[:, None]).sum(0)
            sums[-2] -= (torch.special.xlogy(probabilities_TX, probabilities_TX).sum(-1) * real_T).sum()
            sums[-1] += real_T.sum()
        self._sums = sums if self._sums is None else self._sums + sums

    def statistics(self, mesh: Mesh) -> Mapping[str, torch.Tensor]:
        """Of every pass since the last call, over all processes (collective), by the names of `jaxllm.metrics.routing`."""
        if self._sums is None:
            return {}
        sums, self._sums = mesh.sum(self._sums), None
        count = self._experts.count
        chosen_X, probability_X, entropy, decisions = sums[:count], sums[count : 2 * count], sums[-2], sums[-1].clamp(min=1.0)
        loads_X = chosen_X / chosen_X.sum().clamp(min=1.0) * count
        return {
            BALANCE_LOSS: (chosen_X * probability_X).sum() / decisions**2 * count,
            LARGEST_LOAD: loads_X.max(),
            SMALLEST_LOAD: loads_X.min(),
            ENTROPY: entropy / decisions,
        }


def attach_routing(model: Model, module: Any) -> None:
    """Give `module` a `routing`: what its routers do, None where it has none."""
    module.routing = None if model.spec.mlp.experts is None else Routing(model, module)
