"""Where initial weights come from: the counter-based initialiser, or a folder of safetensors files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxllm.errors import CheckpointError
from jaxllm.families import Model, WeightRule, flatten, stored_names
from jaxllm.families.initialization import initial_values
from jaxllm.state.safetensors_files import SafetensorsReader
from jaxllm.state.training_state import Array, TensorReader


class InitialWeights:
    """The counter-based initial weights of a model as a TensorReader (float32)."""

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


def initial_weights(model: Model, seed: int) -> TensorReader:
    """Weights of a run that starts: from `model.pretrained` if there is one, else from the initialiser."""
    if model.pretrained is None:
        return InitialWeights(model, seed)
    return pretrained_weights(model, Path(model.pretrained))


def pretrained_weights(model: Model, folder: Path) -> TensorReader:
    """The weights of a Hugging Face folder under the names of the weight table.

    A tied weight may be stored under any of its names, and the prefix of the whole model may be left out.  CheckpointError
    names the weights that are missing.
    """
    stored = stored_names(model, SafetensorsReader(folder).names())
    missing = [name for name, _, _ in flatten(model.rules) if name not in stored]
    if missing:
        raise CheckpointError(f"{folder} lacks {listed(missing)}; give a folder with weights of family {model.family}")
    return SafetensorsReader(folder, renamed=stored)


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
