"""The portable form of a TrainingState on disk: Hugging Face weights and Adam moments, all safetensors and JSON.

FOLDER/weights/     config.json, model*.safetensors  -> opens with transformers as it is
FOLDER/moments/     exp_avg*.safetensors, exp_avg_sq*.safetensors
FOLDER/progress.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.errors import CheckpointError
from jaxllm.state.safetensors_files import SafetensorsReader, write_safetensors
from jaxllm.state.training_state import Progress, TrainingState

WEIGHTS, MOMENTS, PROGRESS = "weights", "moments", "progress.json"


def write_weights(
    state: TrainingState, folder: Path, huggingface_config: Mapping[str, Any], *, dtype: str = "float32", is_writer: bool = True
) -> None:
    """The weights and config.json of a state, as `save_pretrained` would write them.  dtype: float32, float64, bfloat16."""
    write_safetensors(state.params, folder, dtype=dtype, is_writer=is_writer)
    if is_writer:
        (folder / "config.json").write_text(json.dumps({**huggingface_config, "dtype": dtype}, indent=2) + "\n")


def write_state(
    state: TrainingState, folder: Path, huggingface_config: Mapping[str, Any], *, dtype: str = "float32", is_writer: bool = True
) -> None:
    """Write a whole state below `folder`, tensor by tensor.

    dtype: of the masters and moments, float32, or float64 for an fp64 run.  Every process of a collective state calls this;
    only `is_writer` touches the disk.  Raises CheckpointError when the disk is full.
    """
    write_weights(state, folder / WEIGHTS, huggingface_config, dtype=dtype, is_writer=is_writer)
    for stem in ("exp_avg", "exp_avg_sq"):
        moment = getattr(state, stem)
        if moment is not None:
            write_safetensors(moment, folder / MOMENTS, stem=stem, dtype=dtype, is_writer=is_writer)
    if is_writer:
        (folder / PROGRESS).write_text(json.dumps(state.progress.to_json()) + "\n")


def is_portable(folder: Path) -> bool:
    """Whether `folder` holds a state in the portable form."""
    return (folder / PROGRESS).is_file()


def read_state(folder: Path) -> TrainingState:
    """A state in the portable form, its tensors read when asked for.  CheckpointError when it is not there or damaged."""
    try:
        progress = Progress.from_json(json.loads((folder / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint in the portable form ({error}); give another folder") from None
    moments = folder / MOMENTS
    has_moments = moments.is_dir()
    return TrainingState(
        progress=progress,
        params=SafetensorsReader(folder / WEIGHTS),
        exp_avg=SafetensorsReader(moments, "exp_avg") if has_moments else None,
        exp_avg_sq=SafetensorsReader(moments, "exp_avg_sq") if has_moments else None,
    )
