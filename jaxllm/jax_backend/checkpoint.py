"""Sharded checkpoints with Orbax: written asynchronously, restored onto any mesh.

FOLDER/jax_state/   {"params": ..., "exp_avg": ..., "exp_avg_sq": ...}, nested as the Flax paths are
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from jaxllm.errors import CheckpointError
from jaxllm.families import Model, WeightRule, flatten, flax_leaves
from jaxllm.jax_backend.network import Params, flatten_paths, nest
from jaxllm.state import Progress, TrainingState
from jaxllm.state.training_state import Array

_SMALL_TREE = 2**26  # bytes
STATE = "jax_state"
PROGRESS = "progress"
Trees = Mapping[str, Mapping[str, Any]]


def _nested(trees: Trees) -> dict[str, Any]:
    return {name: nest(tree) for name, tree in trees.items()}


def _flat(trees: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: flatten_paths(tree) for name, tree in trees.items()}


class AsyncWriter:
    """Writes one checkpoint at a time in the background."""

    def __init__(self) -> None:
        self._pending: ocp.AsyncResponse[None] | None = None
        self._folder = Path()
        # Orbax logs a failed write with its traceback, which `wait` raises as one sentence.
        logging.getLogger("absl").setLevel(logging.CRITICAL)

    def save(self, folder: Path, trees: Mapping[str, Params], progress: Progress) -> None:
        """Start writing; when this returns the arrays may be donated (collective).

        Accelerators have copied them to the host by then.  On the CPU they are in host memory: they are kept as they are until
        they are written, and a step that is given them for its results takes new memory instead.
        """
        self.wait()
        self._folder = folder
        context = ocp.Context()
        # Trained floats hardly compress, and the processor that tries is wanted by the steps that go on.
        context.array.saving.use_compression = False
        with context:
            self._pending = ocp.save_async(
                (folder / STATE).resolve(), _nested(trees), custom_metadata={PROGRESS: progress.to_json()}
            )

    def wait(self) -> None:
        """Return when the last save is on disk; CheckpointError with the reason when it failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:  # whatever a storage driver raises
            reason = str(error).strip().splitlines()[-1]
            raise CheckpointError(
                f"cannot write {self._folder} ({reason}); free disk space or set output_dir elsewhere"
            ) from error


def read_progress(folder: Path) -> Progress:
    """How far the run had come that wrote `folder`."""
    metadata = _open(folder).custom_metadata
    if not metadata or PROGRESS not in metadata:
        raise CheckpointError(f"{folder / STATE} does not say how far its run had come; use another checkpoint")
    return Progress.from_json(metadata[PROGRESS])


def check(folder: Path, names: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """Metadata of every leaf by tree and Flax path, once it is sure that the checkpoint is one of this model.

    names: trees that must be there.  Raises CheckpointError when it is none, damaged, or of another model.
    """
    saved = _flat(_open(folder).metadata)
    for name in names:
        if name not in saved:
            raise CheckpointError(f"{folder / STATE} holds no {name}; use a checkpoint that a training run saved")
        found = {path: tuple(leaf.shape) for path, leaf in saved[name].items()}
        expected = {path: tuple(shape) for path, shape in shapes.items()}
        differ = sorted(path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path))
        if differ:
            listed = ", ".join(f"{path} ({found.get(path)} saved, {expected.get(path)} wanted)" for path in differ[:3])
            raise CheckpointError(f"{folder / STATE} belongs to another model: {listed}; use the model it was made with")
    return saved


def restore(
    folder: Path, names: Sequence[str], shardings: Mapping[str, Mapping[str, NamedSharding]], shapes: Mapping[str, Any]
) -> dict[str, Params]:
    """The trees `names` of a checkpoint with the shardings given for each, whatever mesh wrote them (collective)."""
    wanted = {
        name: {
            path: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[name][path])
            for path, shape in shapes.items()
        }
        for name in names
    }
    return _flat(_load(folder, _nested(wanted)))


def _open(folder: Path) -> Any:
    try:
        return ocp.metadata((folder / STATE).resolve())
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / STATE} is not a JAX checkpoint or is damaged ({error}); use another one") from None


def _load(folder: Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """What `abstract` names, leaving out the rest of the checkpoint."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return dict(ocp.load((folder / STATE).resolve(), abstract))


class SavedWeights:
    """One tree of a checkpoint as a TensorReader, on the host, without the mesh that wrote it.

    All layers of a tensor are read together and kept until another tensor is asked for.  A small tree is read whole: opening
    a checkpoint takes longer than reading one.
    """

    def __init__(self, folder: Path, tree: str, rules: Sequence[WeightRule], dtypes: Mapping[str, np.dtype]) -> None:
        self._folder = folder
        self._tree = tree
        self._rules = {name: (rule, layer) for name, rule, layer in flatten(rules)}
        self._dtypes = dtypes
        self._kept: tuple[WeightRule, list[Array]] | None = None
        sizes = [(leaf.shape, dtypes[leaf.path].itemsize) for leaf in flax_leaves(rules)]
        self._is_small = sum(math.prod(shape) * size for shape, size in sizes) <= _SMALL_TREE
        self._whole: dict[str, Any] | None = None

    def names(self) -> Sequence[str]:
        """Hugging Face names, in checkpoint order."""
        return list(self._rules)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._rules[name][0].shape

    def read(self, name: str, index: Sequence[slice] | None = None) -> Array:
        """The tensor, or a slice of it."""
        rule, layer = self._rules[name]
        leaves = self._leaves(rule)
        tensor = rule.to_huggingface(*(leaf if layer is None else leaf[layer] for leaf in leaves))
        return np.array(tensor[tuple(index)] if index is not None else tensor, order="C")

    def _leaves(self, rule: WeightRule) -> list[Array]:
        if self._is_small:
            if self._whole is None:
                self._whole = self._read([rule for rule, _ in self._rules.values()])
            return [self._whole[path] for path in rule.paths]
        if self._kept is None or self._kept[0] is not rule:
            self._kept = None
            loaded = self._read([rule])
            self._kept = (rule, [loaded[path] for path in rule.paths])
        return self._kept[1]

    def _read(self, rules: Sequence[WeightRule]) -> dict[str, Any]:
        """The leaves of some tensors, by Flax path."""
        wanted = {leaf.path: np.empty(leaf.shape, self._dtypes[leaf.path]) for leaf in flax_leaves(rules)}
        loaded = _flat(_load(self._folder, _nested({self._tree: wanted})))[self._tree]
        return {path: np.asarray(loaded[path]) for path in wanted}


def read_training_state(folder: Path, model: Model) -> TrainingState:
    """The state that `JaxBackend.save` wrote to `folder`, read tensor by tensor in one process, on any machine.

    Raises CheckpointError when there is none, it is damaged, or it belongs to another model.
    """
    saved = check(folder, ["params"], {leaf.path: leaf.shape for leaf in flax_leaves(model.rules)})
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in saved["params"].items()}
    trees = {name: SavedWeights(folder, name, model.rules, dtypes) for name in saved}
    return TrainingState(read_progress(folder), trees["params"], trees.get("exp_avg"), trees.get("exp_avg_sq"))
