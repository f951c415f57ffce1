"""Where initial weights come from: the counter-based initialiser, or a folder of safetensors files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxllm.errors import CheckpointError
from jaxllm.families import Model, WeightRule, flatten
from jaxllm.families.initialization import initial_values
from jaxllm.run import Run
from jaxllm.state.safetensors_files import SafetensorsReader
from jaxllm.state.training_state import Array, TensorReader


class InitialWeights:
    """The initialiser's values as a TensorReader (float32)."""

    def __init__(self, model: Model, seed: int) -> None:
        self._rules: dict[str, WeightRule] = {name: rule for name, rule, _ in flatten(model.rules)}
        self._seed = seed

    def names(self) -> Sequence[str]:
        return list(self._rules)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._rules[name].shape

    def read(self, name: str, index: Sequence[slice] | None = None) -> Array:
        rule = self._rules[name]
        return initial_values(rule.init, self._seed, name, rule.shape, index)


def initial_weights(run: Run) -> TensorReader:
    """Weights of a run that starts: from `model.pretrained` if there is one, else from the initialiser."""
    if run.model.pretrained is None:
        return InitialWeights(run.model, run.config.seed)
    return pretrained_weights(run.model, Path(run.model.pretrained))


def pretrained_weights(model: Model, folder: Path) -> TensorReader:
    """The weights of a Hugging Face folder under the names of the weight table.

    A tied weight may be stored under any of its names.  CheckpointError names weights that are missing or of another shape.
    """
    stored = set(SafetensorsReader(folder).names())
    renamed = {}
    missing = []
    for name, rule, _ in flatten(model.rules):
        if name in stored:
            continue
        alias = next((alias for alias in rule.aliases if alias in stored), None)
        if alias is None:
            missing.append(name)
        else:
            renamed[name] = alias
    if missing:
        raise CheckpointError(f"{folder} lacks {listed(missing)}; give a folder with weights of family {model.family}")
    return SafetensorsReader(folder, renamed=renamed)


def check_shapes(model: Model, reader: TensorReader) -> None:
    """CheckpointError unless `reader` has every weight of the model in its shape."""
    wrong = []
    for name, rule, _ in flatten(model.rules):
        try:
            shape = reader.shape(name)
        except KeyError:
            wrong.append(f"{name} is missing")
            continue
        if shape != rule.shape:
            wrong.append(f"{name} has shape {list(shape)} instead of {list(rule.shape)}")
    if wrong:
        raise CheckpointError(f"the weights do not fit the model: {listed(wrong)}; resume with the model they were made by")


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
