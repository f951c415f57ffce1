"""Levels 1 to 4 of the ladder: weights, one forward pass, one backward pass, one optimiser step, on one device.

Each level is a generator of checks, so that a person sees every figure as soon as it is there.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxllm.backend import Hyper, create_backend, create_probe
from jaxllm.config import RunConfig
from jaxllm.config.schema import BackendName, Precision
from jaxllm.data.batch import Batch
from jaxllm.data.prepare import PreparedData
from jaxllm.families import flatten
from jaxllm.families.initialization import Initializer, initial_values
from jaxllm.parity.inputs import counted, data_inputs, one_pass_config, random_inputs
from jaxllm.parity.results import Check
from jaxllm.parity.routing import decisions
from jaxllm.parity.tolerances import TOLERANCES, gradient_error, has_gradient, idle_parameters, relative_error
from jaxllm.probe import Array, Pass, Probe
from jaxllm.run import Run, on_one_device
from jaxllm.state import Progress, TensorReader, TrainingState, read_state, write_state
from jaxllm.state.initial import initial_weights

BACKENDS: tuple[BackendName, BackendName] = ("jax", "deepspeed")
_REFERENCE: BackendName = "deepspeed"
_OTHER: BackendName = "jax"


def first_step(config: RunConfig) -> Hyper:
    """The hyper-parameters of a first update at the full learning rate: warm-up would make it, and any error in it, small."""
    beta1, beta2 = config.optimizer.betas
    return Hyper(config.optimizer.learning_rate, 1.0 - beta1, 1.0 - beta2)


class RandomTensors:
    """Tensors of a model's names and shapes, random in every element, so that no exchange of two tensors goes unseen.

    power: 1, or 2 for second moments, which are not negative.
    """

    def __init__(self, run: Run, stream: str, power: int = 1) -> None:
        self._rules = {name: rule for name, rule, _ in flatten(run.model.rules)}
        self._stream = f"{stream}/"
        self._power = power
        self._dtype = np.float64 if run.config.training.precision == "fp64" else np.float32

    def names(self) -> Sequence[str]:
        """Hugging Face names."""
        return list(self._rules)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._rules[name].shape

    def read(self, name: str, index: Sequence[slice] | None = None) -> Array:
        """The tensor or a slice of it."""
        values = initial_values(Initializer("normal", std=0.5), 0, self._stream + name, self.shape(name), index)
        return np.power(values, self._power).astype(self._dtype)


def weights(run: Run) -> Iterator[Check]:
    """Hugging Face folder -> each backend -> Hugging Face is the identity, bit for bit; both initialise to the same bits.

    The measured figure is the number of elements that differ.
    """
    run = on_one_device(run)
    precision = run.config.training.precision
    parts = ("params", "exp_avg", "exp_avg_sq")
    state = TrainingState(
        Progress(step=3, updates=3),
        RandomTensors(run, "params"),
        RandomTensors(run, "exp_avg"),
        RandomTensors(run, "exp_avg_sq", power=2),
    )
    with tempfile.TemporaryDirectory() as folder:
        dtype = "float64" if precision == "fp64" else "float32"
        write_state(state, Path(folder), run.model.huggingface_config, dtype=dtype)
        on_disk = read_state(Path(folder))
        for backend in BACKENDS:
            exported = _through(backend, run, on_disk)
            for part in parts:
                different = _different(exported[part], getattr(on_disk, part))
                yield _exact(precision, f"{part}: folder to {backend} and back", different)
    fresh = replace(run, model=replace(run.model, pretrained=None))
    initial = {backend: _through(backend, fresh, None)["params"] for backend in BACKENDS}
    yield _exact(precision, "initial weights of both backends", _different(initial[_OTHER], initial[_REFERENCE]))


def _through(name: BackendName, run: Run, state: TrainingState | None) -> Mapping[str, TensorReader]:
    """The state as a backend gives it back, held in memory."""
    backend = create_backend(name)
    backend.start(run, state)
    try:
        exported = backend.export(state.progress if state else Progress())
        readers = {"params": exported.params, "exp_avg": exported.exp_avg, "exp_avg_sq": exported.exp_avg_sq}
        return {part: Held(reader) for part, reader in readers.items() if reader is not None}
    finally:
        backend.close()


class Held:
    """Tensors in memory, read once from where they were."""

    def __init__(self, reader: TensorReader) -> None:
        self.tensors = {name: np.array(reader.read(name)) for name in reader.names()}

    def names(self) -> Sequence[str]:
        """Hugging Face names."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.tensors[name].shape

    def read(self, name: str, index: Sequence[slice] | None = None) -> NDArray[np.generic]:
        """The tensor or a slice of it."""
        return self.tensors[name][tuple(index) if index else ...]


def _different(found: TensorReader, wanted: TensorReader) -> int:
    """Elements whose bits differ; every element of a tensor that only one side has."""
    count = 0
    for name in {*found.names(), *wanted.names()}:
        if name not in found.names() or name not in wanted.names():
            count += (found if name in found.names() else wanted).read(name).size
        else:
            left, right = found.read(name), wanted.read(name)
            count += left.size if left.dtype != right.dtype else int(np.count_nonzero(_bits(left) != _bits(right)))
    return count


def _bits(values: NDArray[np.generic]) -> NDArray[np.unsignedinteger]:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def _exact(precision: Precision, name: str, different: int) -> Check:
    return Check("weights", precision, f"{name}, elements that differ", float(different), 0.0)


@dataclass
class OnePass:
    """Both sides over the same inputs from the same weights; each pass is taken once and shared by the levels.

    params: the weights compared (None: the pretrained folder's, or the initialiser's).  inputs: name -> batch.
    """

    run: Run
    inputs: Mapping[str, Batch]
    params: TensorReader | None = None

    @classmethod
    def of_run(cls, run: Run, data: PreparedData) -> OnePass:
        """The comparison of a run on its own data."""
        small = on_one_device(replace(run, config=one_pass_config(run.config)))
        return cls(small, data_inputs(small.config, data, data.vocab_size))

    @classmethod
    def of_model(cls, run: Run) -> OnePass:
        """The comparison of a model without data, on random tokens."""
        small = on_one_device(replace(run, config=one_pass_config(run.config)))
        return cls(small, random_inputs(small.config, small.model.spec))

    @cached_property
    def weights(self) -> TensorReader:
        """The weights that both sides are given."""
        return self.params or initial_weights(self.run.model, self.run.config.seed)

    @cached_property
    def passes(self) -> Mapping[BackendName, Mapping[str, Pass]]:
        """Backend -> input -> pass.

        Where routers of the reference choose other experts, both passes are taken again, in which it makes JAX's choices; what
        it would have chosen is in the pass, and judged by the level `forward`.  Then JAX's loss, gradients and choices come
        from one program (`capture`): a tie may fall differently in two.  bf16 is full of ties: choices are left alone.
        """
        found = {label: probe.passes(batch) for probe in [self._probe(_OTHER)] for label, batch in self.inputs.items()}
        probe, wanted = self._probe(_REFERENCE), {}  # JAX's weights are gone by now
        for label, batch in self.inputs.items():
            wanted[label] = probe.passes(batch)
            differ = decisions(batch, found[label].choices, wanted[label].choices).different
            if differ and self.run.config.training.precision != "bf16":
                found[label] = self._probe(_OTHER).passes(batch, capture=True)
                wanted[label] = probe.passes(batch, capture=True, choices=found[label].choices)
        return {_OTHER: found, _REFERENCE: wanted}

    def _probe(self, name: BackendName) -> Probe:
        probe = create_probe(name)
        probe.load(self.run, self.weights)
        return probe

    def pairs(self) -> Iterator[tuple[str, Batch, Pass, Pass]]:
        """Input, batch, the pass of JAX, the pass of the transformers model."""
        for label, batch in self.inputs.items():
            yield label, batch, self.passes[_OTHER][label], self.passes[_REFERENCE][label]


def forward(one_pass: OnePass) -> Iterator[Check]:
    """Experts that routers choose, logits at every token that is not padding, and the loss."""
    precision = one_pass.run.config.training.precision
    bound = TOLERANCES[precision].value
    for label, batch, found, wanted in one_pass.pairs():
        if wanted.choices:
            decided = decisions(batch, found.choices, wanted.choices)
            name = f"experts that routers choose, {label}" + (f": {decided}, ties to within" if decided.different else "")
            detail = {"input": label, "choices": decided.total, "different": decided.different}
            yield Check("forward", precision, name, decided.gap, bound, detail)
        real = counted(batch, wanted.logits)
        error = relative_error(found.logits[real], wanted.logits[real])
        yield Check("forward", precision, f"logits, {label}", error, bound, {"input": label})
        yield Check("forward", precision, f"loss, {label}", relative_error(found.loss, wanted.loss), bound, {"input": label})


def backward(one_pass: OnePass) -> Iterator[Check]:
    """Every parameter's gradient, by Hugging Face name, worst first."""
    precision = one_pass.run.config.training.precision
    bound = TOLERANCES[precision].value
    idle = idle_parameters(one_pass.run.model)
    checks = [
        Check(
            "backward",
            precision,
            f"gradient of {name}, {label}",
            gradient_error(found.gradients[name], gradient, largest_gradient(wanted), idle=name in idle),
            bound,
            {"input": label, "parameter": name},
        )
        for label, _, found, wanted in one_pass.pairs()
        for name, gradient in wanted.gradients.items()
    ]
    yield from sorted(checks, key=lambda check: -check.measured)


def optimizer(one_pass: OnePass) -> Iterator[Check]:
    """One AdamW step with clipping active and one without, from the same weights on the same batch."""
    precision = one_pass.run.config.training.precision
    label, batch = next(iter(one_pass.inputs.items()))
    gradients = one_pass.passes[_REFERENCE][label].gradients
    norm, largest = _global_norm(gradients), largest_gradient(one_pass.passes[_REFERENCE][label])
    idle = idle_parameters(one_pass.run.model)
    for case, clip in (("clipping active", 0.5 * norm), ("clipping inactive", None)):
        config = one_pass.run.config
        settings = config.optimizer.model_copy(update={"clip_norm": clip})
        run = replace(one_pass.run, config=config.model_copy(update={"optimizer": settings}))
        sides = {name: _after_step(name, run, one_pass.weights, batch) for name in BACKENDS}
        for name, wanted in sides[_REFERENCE].items():
            moved = has_gradient(gradients[name], math.inf if name in idle else largest)
            error = relative_error(sides[_OTHER][name][moved], wanted[moved])
            bound = TOLERANCES[precision].trajectory_parameters
            detail = {"parameter": name, "elements_without_gradient": int(moved.size - moved.sum())}
            yield Check("optimizer", precision, f"{name} after a step, {case}", error, bound, detail)


def largest_gradient(one_pass: Pass) -> float:
    """Magnitude of the largest element of all gradients."""
    return max(float(np.abs(gradient).max()) for gradient in one_pass.gradients.values())


def _after_step(name: BackendName, run: Run, params: TensorReader, batch: Batch) -> Mapping[str, Array]:
    probe = create_probe(name)
    probe.load(run, params)
    return probe.after_step(batch, first_step(run.config))


def _global_norm(gradients: Mapping[str, Array]) -> float:
    return float(np.sqrt(sum(float(np.sum(np.square(value, dtype=np.float64))) for value in gradients.values())))
