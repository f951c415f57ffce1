"""Evaluating a trained model on a backend of its own."""

from __future__ import annotations

from jaxllm.backend import create_backend
from jaxllm.checkpointing import drop_portable, open_state, portable_state
from jaxllm.config.schema import BackendName
from jaxllm.data.prepare import PreparedData
from jaxllm.evaluation.evaluate import Evaluated, evaluate
from jaxllm.generation.load import Trained
from jaxllm.generation.search import Search
from jaxllm.state import TrainingState


def trained_state(name: BackendName, trained: Trained) -> TrainingState | None:
    """The weights of a checkpoint for a backend; None where they are the model folder's own."""
    if trained.checkpoint is None:
        return None
    return open_state(trained.checkpoint.folder, trained.run.model) if name == "jax" else portable_state(trained.checkpoint)


def evaluate_trained(name: BackendName, trained: Trained, data: PreparedData, search: Search | None = None) -> Evaluated:
    """Start a backend with the model's weights, evaluate it on the validation split, and close it.  search: of `evaluate`."""
    backend = create_backend(name)
    backend.start(trained.run, trained_state(name, trained), training=False)
    try:
        if trained.checkpoint is not None:
            drop_portable(trained.checkpoint)
        return evaluate(backend, trained.run, data, search)
    finally:
        backend.close()
