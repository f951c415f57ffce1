"""The load-balancing loss and the statistics of routers, against transformers' own function."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from jaxllm.config.schema import ModelConfig
from jaxllm.families import resolve_model
from jaxllm.metrics.routing import BALANCE_LOSS, ENTROPY, LARGEST_LOAD, SMALLEST_LOAD
from jaxllm.torch_backend.float64 import true_float64
from jaxllm.torch_backend.group import alone
from jaxllm.torch_backend.mesh import Mesh
from jaxllm.torch_backend.model import build_model, packed_mask
from tests.tiny import tiny


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_loss_and_gradient_are_those_of_transformers(family: str) -> None:
    model = resolve_model(ModelConfig.model_validate(tiny(family, vocab_size=96)))
    experts, mesh = model.spec.mlp.experts, Mesh(alone(), data=1)
    assert experts is not None
    with true_float64():
        module = build_model(model, "eager", torch.float64, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        segments = torch.tensor([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3])
        tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 96, segments.shape))
        mask = packed_mask(segments, "eager", torch.float64)
        module(input_ids=tokens, attention_mask=mask, position_ids=torch.zeros_like(tokens), use_cache=False)
        logits, real = module.routing.logits, segments > 0
        assert len(logits) == model.spec.layers
        found = module.routing.loss_sum(real, torch.tensor(11.0), mesh)
        own = sys.modules[type(module).__module__].load_balancing_loss_func
        wanted = own(logits, experts.count, experts.per_token, real.double())
        assert found.item() == pytest.approx(11 * experts.balance * wanted.item(), rel=1e-13)
        weights = [parameter for name, parameter in module.named_parameters() if name.endswith("mlp.gate.weight")]
        mine = torch.autograd.grad(found, weights, retain_graph=True)
        theirs = torch.autograd.grad(wanted, weights)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, 11 * experts.balance * other, rtol=1e-11, atol=1e-15)
        module.routing.observe(real)
        statistics = {name: float(value) for name, value in module.routing.statistics(mesh).items()}
    assert statistics[BALANCE_LOSS] == pytest.approx(wanted.item(), rel=1e-13)
    assert 0 <= statistics[SMALLEST_LOAD] < 1 < statistics[LARGEST_LOAD] <= experts.count / experts.per_token
    assert 0 < statistics[ENTROPY] < np.log(experts.count)
    assert not module.routing.statistics(mesh)
