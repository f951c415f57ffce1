"""bf16 compute over fp32 masters without DeepSpeed's help, for ZeRO stage 0.

DeepSpeed refuses bf16 parameters with fp32 gradient accumulation at stage 0.  So it is given a module whose parameters are
the fp32 masters; the bf16 model that computes is hidden inside, and its gradients are added to the masters' in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import Parameter


class MasterWeights(nn.Module):
    """A model in a low precision, seen from outside as its fp32 masters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that torch does not count the low-precision parameters among this module's.
        self._hidden = (model,)
        self.masters = nn.ParameterList()
        self._pairs: list[tuple[Parameter, Parameter]] = []
        for compute in model.parameters():
            master = Parameter(compute.detach().float())
            self.masters.append(master)
            self._pairs.append((compute, master))
            compute.register_post_accumulate_grad_hook(self._hook(master))  # type: ignore[no-untyped-call]

    @staticmethod
    def _hook(master: Parameter) -> Any:
        def add_to_master(compute: torch.Tensor) -> None:
            assert compute.grad is not None  # noqa: S101 - torch calls this after it has accumulated
            gradient = compute.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            compute.grad = None

        return add_to_master

    @property
    def model(self) -> nn.Module:
        """The model that computes."""
        return self._hidden[0]

    @property
    def routing(self) -> Any:
        """What the routers of the model do: see `jaxllm.torch_backend.routing`."""
        return self.model.routing

    @property
    def loss_head(self) -> Any:
        """The model's head: see `jaxllm.torch_backend.chunked_loss`."""
        return self.model.loss_head

    def named_masters(self) -> dict[str, Parameter]:
        """The masters under the names of the model's parameters."""
        return {name: master for (name, _), (_, master) in zip(self.model.named_parameters(), self._pairs, strict=True)}

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model that computes: after every update."""
        for compute, master in self._pairs:
            compute.copy_(master)

    def train(self, mode: bool = True) -> MasterWeights:
        super().train(mode)
        self.model.train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
