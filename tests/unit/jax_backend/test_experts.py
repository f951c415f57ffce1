"""Experts: no token is dropped, spread over devices they are those of one device, and what routers report is true."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.jax_backend.mesh import single_device_mesh
from jaxllm.jax_backend.model.experts import Experts
from jaxllm.jax_backend.model.runtime import Runtime
from jaxllm.jax_backend.precision import policy_of
from jaxllm.jax_backend.sharding import Layout
from jaxllm.metrics.routing import BALANCE_LOSS, ENTROPY, LARGEST_LOAD, SMALLEST_LOAD
from tests.unit.jax_backend import cases

MESHES = {
    "expert 8": {"data": 1, "expert": 8},
    "fsdp 2 x expert 2 x tensor 2": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
    "data 2 x expert 2 x context 2": {"data": 2, "expert": 2, "context": 2},
}
STEPS = range(3)


def moe_run(family: str, mesh: dict[str, int], precision: str = "fp64"):
    return cases.make_run(
        cases.FAMILIES[family],
        training={"precision": precision, "global_batch": 16, "micro_batch": 16 // max(_rows(mesh), 1)},
        parallel=mesh,
        jax={"cpu_devices": int(np.prod(list(mesh.values())))},
    )


def _rows(mesh: dict[str, int]) -> int:
    return mesh.get("data", 1) * mesh.get("fsdp", 1) * mesh.get("expert", 1)


@pytest.mark.parametrize(("family", "mesh"), [*(("mixtral", mesh) for mesh in MESHES), ("qwen3_moe", "expert 8")])
def test_experts_on_many_devices_are_those_of_one(start, family, mesh):
    one, many = (moe_run(family, each) for each in ({"data": 1}, MESHES[mesh]))
    wanted = cases.take_steps(start(one), one, STEPS)
    found = cases.take_steps(start(many), many, STEPS)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-12)
    np.testing.assert_allclose(found.norms, wanted.norms, rtol=1e-11)
    for name, values in wanted.params.items():
        assert cases.relative(found.params[name], values) <= cases.PARAMETER_BOUND, name


@pytest.mark.parametrize("favourite", [None, 3])
def test_every_token_gets_its_experts_even_if_all_want_the_same(favourite):
    """Against a loop over tokens.  favourite: an expert that the router sends every token to."""
    spec = cases.resolve(cases.FAMILIES["mixtral"]).spec
    runtime = Runtime(policy_of("fp64"), Layout(single_device_mesh()))
    module = nnx.split(Experts(spec.mlp, spec.hidden_size, runtime), graph=False)
    random = np.random.default_rng(0)
    weights = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape)), module[1])
    experts = nnx.merge(module[0], weights)
    x_BSE = random.standard_normal((2, 9, spec.hidden_size))
    if favourite is not None:
        router = np.array(experts.router.kernel[...])
        router[:, favourite] = 0.0
        router[0, favourite] = 1e3
        x_BSE[..., 0] = np.abs(x_BSE[..., 0]) + 1.0
        experts.router.kernel[...] = jnp.asarray(router)
    counts_BS = np.ones((2, 9), bool)
    counts_BS[1, 5:] = False
    found, routing = experts(jnp.asarray(x_BSE), jnp.asarray(counts_BS))

    gate, up, down = (np.asarray(each.kernel[...]) for each in (experts.gate, experts.up, experts.down))
    logits = x_BSE @ np.asarray(experts.router.kernel[...])
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    wanted, chosen = np.zeros_like(x_BSE), np.zeros(spec.mlp.experts.count)
    for row, token in np.ndindex(2, 9):
        best = np.argsort(-probabilities[row, token])[: spec.mlp.experts.per_token]
        chosen[best] += counts_BS[row, token]
        for expert in best:
            x = x_BSE[row, token]
            inner = np.asarray(jax.nn.silu(x @ gate[expert])) * (x @ up[expert])
            share = probabilities[row, token, expert] / probabilities[row, token, best].sum()
            wanted[row, token] += share * (inner @ down[expert])
    assert cases.relative(found, wanted) <= 1e-13
    np.testing.assert_array_equal(routing.chosen, chosen)
    np.testing.assert_allclose(routing.probability, (probabilities * counts_BS[..., None]).sum((0, 1)), rtol=1e-12)
    assert routing.tokens == counts_BS.sum()
    if favourite is not None:
        assert chosen[favourite] == counts_BS.sum()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_what_routers_report_is_transformers_own(start, family):
    run = moe_run(family, {"data": 1})
    backend = start(run)
    batch = cases.make_batch()
    reference = cases.Reference(run.model, "fp64")
    with jax.numpy_dtype_promotion("standard"):
        for name, parameter in reference.module.named_parameters():
            parameter.data.copy_(cases.torch.from_numpy(np.array(backend.export(cases.Progress()).params.read(name))))
    reference.loss(batch)
    logits = [each.detach().numpy() for each in reference._router_logits]
    wanted = reference.balance_loss(batch).item()
    found = {name: float(value) for name, value in backend.step(batch, cases.hyper_of(0, run)).statistics.items()}
    assert found[BALANCE_LOSS] == pytest.approx(wanted, rel=1e-12)
    experts, real = run.model.spec.mlp.experts, batch.segments.reshape(-1) > 0
    probabilities = np.concatenate([cases.torch.softmax(cases.torch.tensor(each), -1).numpy()[real] for each in logits])
    loads = np.bincount(np.argsort(-probabilities, -1)[:, : experts.per_token].reshape(-1), minlength=experts.count)
    assert found[LARGEST_LOAD] == pytest.approx(loads.max() / loads.mean(), rel=1e-12)
    assert found[SMALLEST_LOAD] == pytest.approx(loads.min() / loads.mean(), rel=1e-12)
    assert found[ENTROPY] == pytest.approx(-(probabilities * np.log(probabilities)).sum(-1).mean(), rel=1e-12)
