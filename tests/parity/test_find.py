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


def _experts(**changes: Any) -> Callable[[Model], Model]:
    def changed(model: Model) -> Model:
        assert model.spec.mlp.experts is not None
        return _spec(mlp={"experts": replace(model.spec.mlp.experts, **changes)})(model)

    return changed


def _tensor(name: str, change: Callable[[Any], Any]) -> Callable[[Held], Held]:
    def changed(held: Held) -> Held:
        held.tensors[name] = np.ascontiguousarray(change(held.tensors[name]))
        return held

    return changed


def _transposed(name: str) -> Callable[[Held], Held]:
    return _tensor(name, lambda tensor: np.swapaxes(tensor, -1, -2))


def _halves_exchanged(tensor: Any) -> Any:
    """Gate and up of every expert, (X, 2 M, E)."""
    return np.roll(tensor, tensor.shape[1] // 2, axis=1)


def _in_turns(tensor: Any) -> Any:
    """Gate and up of every expert, (X, 2 M, E), as a reader takes them that expects 2i to be gate's and 2i + 1 up's."""
    return np.concatenate([tensor[:, ::2], tensor[:, 1::2]], axis=1)


def _next(tensor: Any) -> Any:
    """Every expert with the weights of the next one."""
    return np.roll(tensor, -1, axis=0)


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


GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
EXPERT_FAULTS: dict[str, tuple[str, dict[str, Any], dict[str, Change], str]] = {
    "a router without renormalisation": (
        "qwen3_moe",
        {},
        {"model": _experts(normalised=False)},
        "router weights that are not divided by their sum",
    ),
    "a renormalisation that is not wanted": (
        "qwen3_moe",
        {"norm_topk_prob": False},
        {"model": _experts(normalised=True)},
        "router weights divided by their sum",
    ),
    "one expert too many": ("mixtral", {}, {"model": _experts(per_token=3)}, "3 experts for each token"),
    "one expert too few": ("qwen3_moe", {}, {"model": _experts(per_token=2)}, "2 experts for each token"),
    "gate and up exchanged": ("mixtral", {}, {"weights": _tensor(GATE_UP, _halves_exchanged)}, "gate and up exchanged"),
    "gate and up in turns": (
        "qwen3_moe",
        {},
        {"weights": _tensor(GATE_UP, _in_turns)},
        "gate and up weights taken in turns (2i, 2i + 1)",
    ),
    "a transposed expert weight": (
        "mixtral",
        {"intermediate_size": 32},
        {"weights": _transposed(DOWN)},
        "the transposed down weight of every expert",
    ),
    "experts off by one": (
        "qwen3_moe",
        {},
        {"weights": lambda held: _tensor(DOWN, _next)(_tensor(GATE_UP, _next)(held))},
        "the next expert instead of the chosen one",
    ),
    "an activation of another kind": (
        "mixtral",
        {},
        {"model": _spec(mlp={"activation": "gelu_tanh"})},
        "the activation gelu_tanh",
    ),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _find(family: str, cache: Path, faulty: Faulty, precision: Precision = "fp64", **changes: Any) -> Finding:
    examined = subject(family, cache, **changes)
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


DAILY = ("a router without renormalisation", "one expert too many", "gate and up exchanged", "a transposed expert weight")


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[] if fault in DAILY else pytest.mark.nightly) for fault in EXPERT_FAULTS]
)
def test_a_fault_of_a_mixture_of_experts_is_found_and_named(fault: str, cache: Path) -> None:
    family, changes, plant, diagnosis = EXPERT_FAULTS[fault]
    _assert_found(_find(family, cache, Faulty(**plant), **changes), "layers.0.mlp_output", f"JAX computes {diagnosis}")


def test_a_fault_of_a_router_is_found_before_its_experts(cache: Path) -> None:
    faulty = Faulty(weights=_transposed("model.layers.0.mlp.gate.weight"))
    finding = _find("mixtral", cache, faulty, num_local_experts=32)  # as many as the hidden size
    _assert_found(finding, "layers.0.router", "JAX computes the transposed router weight")


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
