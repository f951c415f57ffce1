"""Taps: the program of ordinary training bears no trace of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.jax_backend.model.experts import CHOSEN
from jaxllm.jax_backend.model.stack import stretches
from jaxllm.jax_backend.model.tap import NO_TAP, Recorder, Tap
from jaxllm.jax_backend.optimizer import step_scalars
from jaxllm.jax_backend.remat import named
from jaxllm.probe import layer_points
from tests.unit.jax_backend import cases


def train_program(start, family: str, remat: str):
    """The jaxpr of a run's training step, with accumulation and dropout where the family has any."""
    model = dict(cases.FAMILIES[family])
    if family == "gpt2":
        model.update(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    run = cases.make_run(model, training={"micro_batch": 4}, jax={"remat": remat})
    started = start(run)._started
    scalars = step_scalars(cases.hyper_of(0, run), run.config.optimizer, np.dtype(np.float32))
    batch = started.feed(cases.make_batch())
    return started, started.train_step.trace(started.params, started.moments, batch, scalars, np.uint32(0)).jaxpr


@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_taps_leave_no_trace_in_the_training_program(family, remat, start, monkeypatch):
    """The program is, to the letter, that of a model whose taps only name what they see, for `jax.remat`."""
    _, shipped = train_program(start, family, remat)
    passed: set[str] = set()

    def nothing(self: Tap, point: str, x: jax.Array) -> jax.Array:
        passed.add(point)
        return named(x, point)

    monkeypatch.setattr(Tap, "__call__", nothing)
    started, wanted = train_program(start, family, remat)
    assert str(shipped) == str(wanted)
    decisions = set() if started.network.spec.mlp.experts is None else {CHOSEN}
    assert passed == {"embedding", *layer_points(started.network.spec), "final_norm", "logits"} | decisions
    weights = [path for path in started.network.shapes if path.startswith("layers.")]
    for stretch in stretches(started.network.spec.attentions):
        scans = [scan for scan in _scans(shipped.jaxpr) if scan.params["length"] == stretch.repeats]
        scanned = [len(scan.invars) - scan.params["num_consts"] - scan.params["num_carry"] for scan in scans]
        # Nothing but the weights and the index goes into a layer, beside what all layers share.
        assert min(count for count in scanned if count >= len(weights)) == len(weights) + 1


def test_the_ordinary_tap_gives_the_scan_nothing():
    x = jnp.ones(3)
    np.testing.assert_array_equal(NO_TAP("query", x), x)
    assert NO_TAP.of_layer(NO_TAP.layer_offsets()) is NO_TAP
    assert jax.tree.leaves((NO_TAP.layer_offsets(), NO_TAP.records())) == []


def test_two_points_of_one_name_are_refused():
    recorder = Recorder({})
    recorder("query", jnp.ones(3))
    with pytest.raises(ValueError, match="two points called 'query'"):
        recorder("query", jnp.ones(3))


def _scans(jaxpr):
    """Every scan in a jaxpr and in what it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _scans(inner)
