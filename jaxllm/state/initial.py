"""Where initial weights come from: the counter-based initialiser, or a folder of safetensors files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxllm.errors import CheckpointError
from jaxllm.families import Model, WeightRule, flatten, stored_names
from jaxllm.families.initialization import initial_values
from jaxllm.state.pieces import JoinedReader
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
    return pretrained_weights(model, Path(model.pretrained), seed)


def pretrained_weights(model: Model, folder: Path, seed: int = 0) -> TensorReader:
    """The weights of a Hugging Face folder under the names of the weight table; a head that it lacks starts fresh.

    A tied weight may be stored under any of its names, and the prefix of the whole model may be left out.  CheckpointError
    names the weights that are missing.
    """
    found = compare_folder(model, folder)
    _check_ties(model, folder)
    if found.missing:
        raise CheckpointError(f"{folder} lacks {listed(found.missing)}; give a folder with weights of family {model.family}")
    stored: TensorReader = SafetensorsReader(folder, renamed=found.stored)
    if found.pieces:
        stored = JoinedReader(stored, list(found.stored), found.pieces)
    return _WithFreshHead(stored, InitialWeights(model, seed), frozenset(found.fresh)) if found.fresh else stored


def _check_ties(model: Model, folder: Path) -> None:
    """CheckpointError when a folder holds different weights under names that the model has one weight for."""
    reader = SafetensorsReader(folder)
    stored = set(reader.names())
    for rule in model.rules:
        present = [name for name in (rule.name, *rule.aliases) if name in stored]
        for other in present[1:]:
            if not np.array_equal(reader.read(present[0]), reader.read(other)):
                raise CheckpointError(
                    f"{folder} holds different weights for {present[0]} and {other}, which are one by its config.json; if they "
                    "should not be, set tie_word_embeddings to false there"
                )


@dataclass(frozen=True)
class Compared:
    """A model's weights against a folder's.

    stored: name in the weight table -> name in the folder.  pieces: of tensors that the folder holds cut up (`JoinedReader`).
    fresh: weights of the head that the folder lacks or has in another shape, so that they are initialised.  missing: any others
    that it lacks.  unused: those of the folder that the model lacks.
    """

    stored: Mapping[str, str]
    pieces: Mapping[str, tuple[tuple[str, ...], ...]]
    fresh: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def sentences(self, folder: Path) -> Iterator[str]:
        """What a person should know who trains from the folder."""
        if self.fresh:
            yield f"{folder} has no {listed(self.fresh)} of this shape: the head starts with fresh weights"
        if self.unused:
            yield f"{folder} holds weights that this model does not have, which are left out: {listed(self.unused)}"


def compare_folder(model: Model, folder: Path) -> Compared:
    """Which weights of a model a Hugging Face folder has."""
    reader = SafetensorsReader(folder)
    names = reader.names()
    stored = stored_names(model, names)
    rules = {name: rule for name, rule, _ in flatten(model.rules)}
    heads = [name for name, rule in rules.items() if rule.paths[0].startswith("head.") and model.spec.head.kind != "causal-lm"]
    fresh = tuple(name for name in heads if name not in stored or reader.shape(stored[name]) != rules[name].shape)
    kept = {name: where for name, where in stored.items() if name not in fresh}
    cut = {name: rule.stored_pieces(layer) for name, rule, layer in flatten(model.rules) if rule.pieces and name not in kept}
    present = set(names)
    pieces = {name: grid for name, grid in cut.items() if all(present.issuperset(row) for row in grid)}
    missing = tuple(name for name in rules if name not in kept and name not in fresh and name not in pieces)
    aliases = {alias for rule in rules.values() for alias in rule.aliases}
    taken = {*kept.values(), *aliases, *fresh, *(piece for grid in pieces.values() for row in grid for piece in row)}
    unused = tuple(name for name in names if name not in taken)
    return Compared(kept, pieces, fresh, missing, unused)


class _WithFreshHead:
    """A folder's weights, but for those of a head that it lacks."""

    def __init__(self, stored: TensorReader, initial: InitialWeights, fresh: frozenset[str]) -> None:
        self._stored = stored
        self._initial = initial
        self._fresh = fresh

    def _reader(self, name: str) -> TensorReader:
        return self._initial if name in self._fresh else self._stored

    def names(self) -> Sequence[str]:
        return self._initial.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader(name).shape(name)

    def read(self, name: str, index: Sequence[slice] | None = None) -> Array:
        return self._reader(name).read(name, index)


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
        raise CheckpointError(f"the weights do not fit the model: {listed(wrong)}; use the weights and the config of one model")


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
