"""AdamW and clipping against torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxllm.backend import Hyper
from jaxllm.config.schema import OptimizerConfig
from jaxllm.jax_backend.optimizer import adamw, clip_factor, step_scalars
from tests.unit.jax_backend import cases

DECAYS = {"matrix": True, "bias": False}


def initial(dtype):
    generator = np.random.default_rng(0)
    return {"matrix": (generator.standard_normal((40, 50)) * 0.02).astype(dtype), "bias": np.zeros(50, dtype)}


def gradients(step, dtype):
    """Large and small ones in turn, so that clipping is active now and then."""
    generator = np.random.default_rng(step)
    scale = 0.1 if step % 3 else 0.005
    return {"matrix": generator.standard_normal((40, 50)) * scale, "bias": generator.standard_normal(50) * scale}


def train_torch(config, dtype, steps):
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in initial(dtype).items()}
    groups = [
        {"params": [param], "weight_decay": config.weight_decay if DECAYS[name] else 0.0} for name, param in params.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)
    for step in range(1, steps + 1):
        for name, gradient in gradients(step, dtype).items():
            params[name].grad = torch.tensor(gradient.astype(dtype))
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(params.values()), config.clip_norm)
        optimizer.step()
    return {name: param.detach().numpy() for name, param in params.items()}


def train_jax(config, dtype, steps):
    transformation = adamw(config, DECAYS)

    @jax.jit
    def update(params, moments, grads, scalars):
        norm = jnp.sqrt(sum(jnp.sum(gradient * gradient) for gradient in grads.values()))
        grads = jax.tree.map(lambda gradient: gradient * clip_factor(norm, config.clip_norm), grads)
        updates, moments = transformation.update(grads, moments, params, scalars=scalars)
        return optax.apply_updates(params, updates), moments

    params = {name: jnp.asarray(value) for name, value in initial(dtype).items()}
    moments = transformation.init(params)
    for step in range(1, steps + 1):
        hyper = Hyper(config.learning_rate, 1.0 - config.betas[0] ** step, 1.0 - config.betas[1] ** step)
        grads = {name: gradient.astype(dtype) for name, gradient in gradients(step, dtype).items()}
        params, moments = update(params, moments, grads, step_scalars(hyper, config, np.dtype(dtype)))
    assert update._cache_size() == 1
    return {name: np.asarray(param) for name, param in params.items()}


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.4, 0.999)], ids=["usual", "lerp-from-the-far-end"])
@pytest.mark.parametrize("clip_norm", [1.0, None])
def test_a_thousand_steps_equal_torch_in_float64(betas, clip_norm):
    config = OptimizerConfig(learning_rate=1e-3, betas=betas, weight_decay=0.1, clip_norm=clip_norm)
    ours, wanted = train_jax(config, np.float64, 1000), train_torch(config, np.float64, 1000)
    for name in DECAYS:
        assert cases.relative(ours[name], wanted[name]) <= 1e-12
        assert np.abs(ours[name] - wanted[name]).max() <= 1e-12 * np.abs(wanted[name]).max()


def test_one_step_equals_torch_to_the_last_bits_in_float32():
    config = OptimizerConfig(learning_rate=1e-3, clip_norm=None)
    ours, wanted = train_jax(config, np.float32, 1), train_torch(config, np.float32, 1)
    before = initial(np.float32)["matrix"]
    moved = np.abs(wanted["matrix"] - before)
    assert (moved > 0).all()
    # One unit in the last place of the sum, and one of the update, whose quotient rounds before it is added.
    unit = np.spacing(np.maximum(np.abs(wanted["matrix"]), np.abs(before)))
    assert (np.abs(ours["matrix"] - wanted["matrix"]) <= unit + np.spacing(moved)).all()


def test_a_hundred_steps_stay_within_rounding_in_float32():
    config = OptimizerConfig(learning_rate=1e-3)
    ours, wanted = train_jax(config, np.float32, 100), train_torch(config, np.float32, 100)
    assert max(cases.relative(ours[name], wanted[name]) for name in DECAYS) <= 1e-6


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0 - 1e-7, 1.0, 1.5, 1e6])
def test_clipping_is_torchs(norm):
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    parameter.grad = torch.tensor([norm], dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    ours = norm * float(clip_factor(jnp.asarray(norm, jnp.float64), 1.0))
    assert ours == pytest.approx(parameter.grad.item(), rel=1e-15)


def test_updates_without_parameters_are_refused():
    config = OptimizerConfig(learning_rate=1e-3)
    transformation = adamw(config, DECAYS)
    params = {name: jnp.asarray(value) for name, value in initial(np.float32).items()}
    scalars = step_scalars(Hyper(1e-3, 0.1, 0.05), config, np.dtype(np.float32))
    with pytest.raises(ValueError, match="needs the parameters"):
        transformation.update(params, transformation.init(params), None, scalars=scalars)


@pytest.mark.parametrize("finite", [True, False])
def test_nothing_changes_after_a_step_that_is_not_finite(finite):
    config = OptimizerConfig(learning_rate=1e-3)
    transformation = adamw(config, DECAYS)
    params = {name: jnp.asarray(value) for name, value in initial(np.float32).items()}
    params["bias"] = params["bias"].at[0].set(-0.0)
    moments = transformation.init(params)
    change = jax.tree.map(jnp.ones_like if finite else lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    scalars = step_scalars(Hyper(1e-3, 0.1, 0.05), config, np.dtype(np.float32))
    updates, new_moments = transformation.update(change, moments, params, scalars=scalars, finite=jnp.asarray(finite))
    before, after = ([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
                     for tree in ((params, moments), (optax.apply_updates(params, updates), new_moments)))  # fmt: skip
    assert all((one == other) is not finite for one, other in zip(before, after, strict=True))
