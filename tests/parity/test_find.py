"""`--find` on planted faults: each is found at the operation that holds it, and named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.backend import Hyper, create_probe
from jaxllm.config.schema import Precision
from jaxllm.data.batch import Batch
from jaxllm.families import Model, WeightRule
from jaxllm.jax_backend.model import attention
from jaxllm.parity.find import Finding, find
from jaxllm.parity.levels import Held
from jaxllm.probe import Array, Pass, Probe
from jaxllm.run import Run
from jaxllm.state import TensorReader
from tests.parity.subjects import subject
from tests.tiny import TINY

Change = Callable[[Any], Any]


@dataclass
class Faulty:
    """JAX's probe with a mistake: in the model it builds, the weights it is given or the batch it reads."""

    model: Callable[[Model], Model] = lambda model: model
    weights: Callable[[Held], Held] = lambda held: held
    batch: Callable[[Batch], Batch] = lambda batch: batch

    def __post_init__(self) -> None:
        self.inner: Probe = create_probe("jax")
        self.name = "jax"

    def load(self, run: Run, params: TensorReader) -> None:
        self.inner.load(replace(run, model=self.model(run.model)), self.weights(Held(params)))

    def passes(self, batch: Batch, *, capture: bool = False) -> Pass:
        return self.inner.passes(self.batch(batch), capture=capture)

    def after_step(self, batch: Batch, hyper: Hyper) -> Mapping[str, Array]:
        return self.inner.after_step(self.batch(batch), hyper)


class MeanOfMeans(Faulty):
    """Each micro-batch is averaged by itself, then the averages are averaged."""

    def passes(self, batch: Batch, *, capture: bool = False) -> Pass:
        if capture:
            return super().passes(batch, capture=True)
        half = batch.rows // 2
        parts = [self.inner.passes(batch.select(0, half)), self.inner.passes(batch.select(half, batch.rows))]
        gradients = {name: (parts[0].gradients[name] + parts[1].gradients[name]) / 2 for name in parts[0].gradients}
        logits = np.concatenate([part.logits for part in parts])
        return Pass(float(np.mean([part.loss for part in parts])), logits, gradients)


def _spec(**changes: Any) -> Callable[[Model], Model]:
    def changed(model: Model) -> Model:
        attention = changes.pop("attention", {})
        parts = {part: replace(getattr(model.spec, part), **keys) for part, keys in changes.items()}
        return replace(model, spec=replace(model.spec, **parts).with_attention(**attention))

    return changed


def _transposed(name: str) -> Callable[[Held], Held]:
    def transpose(held: Held) -> Held:
        held.tensors[name] = held.tensors[name].T.copy()
        return held

    return transpose


def _shifted(batch: Batch) -> Batch:
    return replace(batch, positions=batch.positions + 1)


def _leaking(batch: Batch) -> Batch:
    return replace(batch, segments=np.minimum(batch.segments, 1))


def _interleaved(x_BSHD: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    cos, sin = (table[..., : x_BSHD.shape[-1] // 2] for table in tables)
    cos, sin = (jnp.expand_dims(table, -2) if table.ndim == x_BSHD.ndim - 1 else table for table in (cos, sin))
    even, odd = x_BSHD[..., ::2], x_BSHD[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x_BSHD.shape)


class DecayedNorm(WeightRule):
    """A rule whose weight decays although it is a norm's."""

    decays = True


def _decayed_norm(model: Model) -> Model:
    def decayed(rule: WeightRule) -> WeightRule:
        fields = {name: getattr(rule, name) for name in rule.__dataclass_fields__}
        return DecayedNorm(**fields) if rule.kind == "norm" else rule

    return replace(model, rules=tuple(decayed(rule) for rule in model.rules))


FAULTS: dict[str, tuple[str, Callable[[], Faulty], str, str]] = {
    "a wrong norm epsilon": (
        "llama",
        lambda: Faulty(model=_spec(norm={"eps": 1e-6})),
        "layers.0.attention_norm",
        "JAX computes a norm of kind rms with epsilon 1e-06",
    ),
    "tanh for erf GELU": (
        "gpt2",
        lambda: Faulty(model=_spec(mlp={"activation": "gelu_tanh"})),
        "layers.0.mlp_output",
        "JAX computes the activation gelu_tanh",
    ),
    "a transposed weight": (
        "llama",
        lambda: Faulty(weights=_transposed("model.layers.1.self_attn.o_proj.weight")),
        "layers.1.attention_output",
        "JAX computes the transposed output weight",
    ),
    "an off-by-one position, rotary": (
        "llama",
        lambda: Faulty(batch=_shifted),
        "layers.0.query",
        "JAX computes positions that begin at 1",
    ),
    "an off-by-one position, learned": (
        "gpt2",
        lambda: Faulty(batch=_shifted),
        "embedding",
        "JAX computes positions that begin at 1",
    ),
    "a missing attention scale": (
        "gpt2",
        lambda: Faulty(model=_spec(attention={"scale": 1.0})),
        "layers.0.attention_output",
        "JAX computes attention without its scale",
    ),
    "a mask that leaks across packed documents": (
        "llama",
        lambda: Faulty(batch=_leaking),
        "layers.0.attention_output",
        "JAX computes attention that leaks across documents",
    ),
    "weight decay on a norm": (
        "llama",
        lambda: Faulty(model=_decayed_norm),
        "model.layers.0.input_layernorm.weight",
        "JAX computes an update with weight decay",
    ),
    "a loss averaged per micro-batch": (
        "gpt2",
        MeanOfMeans,
        "accumulated over micro-batches",
        "JAX computes the average of the micro-batches' means",
    ),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _find(family: str, cache: Path, faulty: Faulty, precision: Precision = "fp64") -> Finding:
    examined = subject(family, cache)
    return find(examined.in_precision(precision), examined.data, precision, probes=(faulty, create_probe("deepspeed")))


def _assert_found(finding: Finding, where: str, diagnosis: str) -> None:
    first = finding.first
    assert first is not None
    assert first.name == where
    assert diagnosis in finding.diagnosis
    assert "transformers computes what the config says" in finding.diagnosis
    assert finding.departure is not None
    assert all(step.agrees for step in finding.steps[: finding.departure])
    assert finding.to_json()["departure"]["name"] == where


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(fault: str, cache: Path) -> None:
    family, plant, where, diagnosis = FAULTS[fault]
    _assert_found(_find(family, cache, plant()), where, diagnosis)


def test_a_swapped_rope_layout_is_found_and_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "rotate", _interleaved)
    finding = _find("llama", cache, Faulty())
    _assert_found(finding, "layers.0.query", "JAX computes rotary positions that pair neighbours (2i, 2i + 1)")


OTHERS = [family for family in TINY if family not in ("llama", "gpt2")]
PASSES = [
    *((family, precision) for family in ("llama", "gpt2") for precision in ("fp64", "fp32")),
    *(pytest.param(family, "fp64", marks=pytest.mark.nightly) for family in OTHERS),
]


@pytest.mark.parametrize(("family", "precision"), PASSES)
def test_without_a_fault_nothing_is_found(family: str, precision: Precision, cache: Path) -> None:
    finding = _find(family, cache, Faulty(), precision)
    assert finding.agrees, finding.first
    assert {step.stage for step in finding.steps} == {"forward", "loss", "backward", "gradient of", "optimizer step of"}
