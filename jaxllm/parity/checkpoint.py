"""`--model FOLDER`: a Hugging Face checkpoint of a supported family, JAX against transformers, in fp64 and its own dtype."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from jaxllm.config import RunConfig
from jaxllm.config.schema import ModelConfig, Precision
from jaxllm.errors import CheckpointError
from jaxllm.families import resolve_model
from jaxllm.parity.levels import OnePass, backward, forward
from jaxllm.parity.results import Check
from jaxllm.run import Run
from jaxllm.state.initial import check_shapes, pretrained_weights

MAX_TOKENS = 512
"""Tokens per sequence: enough to show a mistake in positions."""

_PRECISIONS: dict[str, Precision] = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16"}


def compare_folder(folder: Path) -> Iterator[Check]:
    """Logits, loss and every gradient on random tokens, packed and padded.

    CheckpointError for a folder that holds no checkpoint, lacks weights, or is of a dtype that is not trained in.  In bf16
    there is no bound: the figures say how far two roundings to 8 bits are apart.
    """
    model = resolve_model(ModelConfig.model_validate({"from": str(folder)}))
    check_shapes(model, pretrained_weights(model, folder))
    for precision in dict.fromkeys(("fp64", _own_precision(folder))):
        length = min(MAX_TOKENS, model.spec.max_positions)
        run = Run(_config(folder, precision, length), model, total_steps=1)
        one_pass = OnePass.of_model(run)
        yield from forward(one_pass)
        yield from backward(one_pass)


def _own_precision(folder: Path) -> Precision:
    written = json.loads((folder / "config.json").read_text())
    name = str(written.get("dtype") or written.get("torch_dtype") or "float32")
    if name not in _PRECISIONS:
        raise CheckpointError(f"{folder / 'config.json'} says dtype {name!r}; only {', '.join(_PRECISIONS)} are compared")
    return _PRECISIONS[name]


def _config(folder: Path, precision: Precision, length: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "checkpoint",
            "model": {"from": str(folder)},
            "data": {"tokenizer": {"from": str(folder)}, "sequence_length": length},
            "optimizer": {"learning_rate": 0.0},
            "training": {"steps": 1, "global_batch": 2, "precision": precision},
        }
    )
