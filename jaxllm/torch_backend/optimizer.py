"""AdamW with the numerical contract's decay groups, clipping and non-finite guard."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.nn import Parameter

from jaxllm.config.schema import OptimizerConfig
from jaxllm.families import Model, flatten
from jaxllm.families.rates import rate_scales
from jaxllm.torch_backend.mesh import Mesh

RATE = "rate"


def parameter_groups(parameters: Mapping[str, Parameter], model: Model, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The optimiser's parameter groups: what decays, then what does not, each in checkpoint order.

    Weights whose learning rates differ are in groups of their own; RATE is what a group's is multiplied by.  Frozen weights
    stay with the optimiser at a rate of zero, and have no gradient, so that a state has the same parts whatever is frozen.
    """
    scales = rate_scales(model, config)
    decays = {name: rule.decays for name, rule, _ in flatten(model.rules)}
    rates = list(dict.fromkeys(scales.values())) or [1.0]
    groups = [
        {
            "params": [parameters[name] for name in decays if decays[name] is wanted and scales.get(name, 1.0) == rate],
            "weight_decay": decay,
            RATE: rate,
        }
        for wanted, decay in ((True, config.weight_decay), (False, 0.0))
        for rate in rates
    ]
    return [group for group in groups if group["params"]]


def freeze(named: Mapping[str, Parameter], model: Model, config: OptimizerConfig) -> None:
    """Take away the gradients of frozen weights.  named: the parameters of the model that computes."""
    for name, scale in rate_scales(model, config).items():
        if scale == 0.0:
            named[name].register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW of torch; DeepSpeed clips and guards around it at ZeRO stages 1 to 3."""
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips by the global norm and leaves everything as it is when that norm is not finite.

    DeepSpeed has no such guard at stage 0.  After `step`, `_global_grad_norm` and `overflow` say what happened: the names that
    a DeepSpeed engine reads from an optimiser.  sharded: the parameters of which this process has a tensor-parallel shard.
    """

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimizerConfig, mesh: Mesh, sharded: Collection[Parameter] = ()
    ) -> None:
        super().__init__(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
        self._clip_norm = config.clip_norm
        self._mesh = mesh
        self._sharded = {id(parameter) for parameter in sharded}
        self._global_grad_norm = torch.zeros(())
        self.overflow = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update, or none when the gradient norm is NaN or infinite."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = self._norm(parameters)
        self._global_grad_norm = norm
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return None
        if self._clip_norm is not None:
            # Factor min(1, clip_norm / (norm + 1e-6)).
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        return super().step(closure)

    def _norm(self, parameters: Sequence[Parameter]) -> torch.Tensor:
        """The norm of the gradient of the whole model (collective)."""
        total_norm = torch.nn.utils.get_total_norm
        if not self._sharded:
            return total_norm([p.grad for p in parameters if p.grad is not None])
        whole, shards = (
            total_norm([p.grad for p in parameters if p.grad is not None and (id(p) in self._sharded) is wanted]).double()
            for wanted in (False, True)
        )
        return (whole.square() + self._mesh.sum_shards(shards.square())).sqrt().to(parameters[0].dtype)
