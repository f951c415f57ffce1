"""The folder that all contenders of a case read: a transformers model with jaxllm's initial weights of seed 0, and tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.throughput.cases import Case
from jaxllm.config.schema import ModelConfig
from jaxllm.families import Model, resolve_model
from jaxllm.state.initial import initial_weights
from jaxllm.state.portable import write_weights
from jaxllm.state.training_state import Progress, TrainingState

BATCHES = 8
"""Different batches; later steps meet them again."""


def model_of(case: Case) -> Model:
    """The case's model."""
    return resolve_model(ModelConfig.model_validate(case.model))


def prepare(case: Case, folder: Path) -> None:
    """Fill `folder` with config.json, safetensors (float32) and tokens.npy (batches, B, S + 1)."""
    model = model_of(case)
    write_weights(TrainingState(Progress(), initial_weights(model, 0)), folder, model.huggingface_config, dtype="float32")
    generator = np.random.default_rng(0)
    shape = (BATCHES, case.rows, case.sequence + 1)
    # Rare and frequent tokens, as in text, so that a few steps make the loss fall and a step left out is seen in it.
    ranks = np.minimum(generator.zipf(1.2, shape) - 1, case.model["vocab_size"] - 1)
    np.save(folder / "tokens.npy", ranks.astype(np.int32))
