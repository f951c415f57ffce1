"""What layers keep, and what waits in the host's memory: the numbers stay, the work and the memory change."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from pydantic import ValidationError

from jaxllm.config.batch import BatchPlan
from jaxllm.config.remat import PRODUCTS, Kept, kept_points
from jaxllm.config.schema import JaxConfig
from jaxllm.errors import ConfigError
from jaxllm.jax_backend.assembly import assemble
from jaxllm.jax_backend.feed import BatchFeed
from jaxllm.jax_backend.mesh import single_device_mesh
from jaxllm.jax_backend.offload import check_host_memory
from jaxllm.jax_backend.step import loss_and_gradients
from jaxllm.jax_backend.weights import load_params
from jaxllm.state import Progress
from jaxllm.state.initial import initial_weights
from tests.unit.jax_backend import cases

POLICIES = ("none", "full", "dots", "products", "offload", ["query", "attention_mixed", "mlp_up@host", "layer_input@host"])


@pytest.fixture(scope="module")
def passes():
    """By policy: FLOPs of the forward and backward pass as written, and its loss and gradients."""
    found = {}
    for policy in POLICIES:
        run = cases.make_run(training={"precision": "fp64"}, jax={"remat": policy})
        parts = assemble(run, mesh := single_device_mesh())
        params = load_params(initial_weights(run.model, 3), run.model.rules, parts.shardings, np.dtype(np.float64))
        batch = BatchFeed(mesh, BatchPlan(16, 1))(cases.make_batch())
        compute = jax.jit(lambda p, b, parts=parts: loss_and_gradients(parts.network, parts.shardings, p, b, lambda _: None))
        lowered = compute.lower(params, batch)
        found[str(policy)] = (lowered.cost_analysis()["flops"], *compute(params, batch))
    return found


@pytest.mark.parametrize("policy", [str(policy) for policy in POLICIES[1:]])
def test_what_is_computed_again_is_the_same(passes, policy):
    _, wanted, gradients = passes["none"]
    _, found, again = passes[policy]
    assert float(found.loss) == pytest.approx(float(wanted.loss), rel=1e-14)
    for path, gradient in gradients.items():
        assert cases.relative(again[path], gradient) <= 1e-13, path


def test_policies_do_the_work_they_say(passes):
    flops = {policy: found[0] for policy, found in passes.items()}
    assert flops["none"] < flops["dots"] < flops["full"]
    # No product with a weight is repeated: what is left is attention's own two products and what is no product.
    tokens, heads, head_dim = 16 * 32, 4, 8
    for policy in ("products", "offload"):
        assert 0 < flops[policy] - flops["none"] < 2 * 2 * tokens * 32 * heads * head_dim + 100 * tokens * 48
        assert flops[policy] < flops["full"]


def test_lists_name_points_on_the_device_and_on_the_host():
    assert kept_points(("query", "mlp_up@host")) == Kept(("query",), ("mlp_up",))
    assert kept_points("offload") == Kept((), PRODUCTS)
    assert kept_points("products") == Kept(PRODUCTS, ())
    assert kept_points("dots") is None


@pytest.mark.parametrize(
    ("remat", "message"),
    [
        (["query", "quary"], "no point of a layer is called 'quary'; did you mean 'query'?"),
        (["query", "query@host"], "query comes twice"),
        ("fulll", "full"),
    ],
)
def test_unknown_points_are_refused(remat, message):
    with pytest.raises(ValidationError, match=message.replace("?", r"\?")):
        JaxConfig.model_validate({"remat": remat})


def test_optimizer_state_waits_on_the_host_and_nothing_else_changes(start, tmp_path):
    mesh = {"parallel": {"data": 1, "fsdp": 4}, "training": {"precision": "bf16"}}
    wanted = cases.take_steps(start(run := cases.make_run(jax={"cpu_devices": 8}, **mesh)), run, range(3))
    for offload, kinds in (("moments", ("device", "pinned_host")), ("all", ("pinned_host", "pinned_host"))):
        run = cases.make_run(jax={"cpu_devices": 8, "offload_optimizer": offload}, **mesh)
        backend = start(run)
        found = cases.take_steps(backend, run, range(3))
        assert found.losses == wanted.losses
        for name, values in wanted.params.items():
            np.testing.assert_allclose(found.params[name], values, rtol=1e-6, atol=1e-7)
        assert memory_kinds(backend) == kinds
    backend.save(tmp_path, Progress(3, 3, 48, 1000))
    backend.wait()
    after = float(backend.step(cases.make_batch(3), cases.hyper_of(3, run)).loss)
    backend.restore(tmp_path)
    assert float(backend.step(cases.make_batch(3), cases.hyper_of(3, run)).loss) == after
    assert memory_kinds(backend) == ("pinned_host", "pinned_host")


def memory_kinds(backend):
    """Where parameters and moments are."""
    inner = backend._started
    kinds = [{leaf.sharding.memory_kind for leaf in tree.values()} for tree in (inner.params, inner.moments.exp_avg)]
    return tuple(kind for (kind,) in kinds)


def test_devices_without_host_memory_are_refused():
    class Device:
        device_kind = "abacus"

        def memory(self, kind):
            raise ValueError(kind)

    class Mesh:
        devices = np.array([Device()])

    with pytest.raises(ConfigError, match="abacus devices cannot use the memory of the host") as caught:
        check_host_memory(Mesh(), "jax.offload_optimizer")
    assert caught.value.key == "jax.offload_optimizer"
