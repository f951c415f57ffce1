"""`python -m jaxllm.convert CHECKPOINT OUT`: a checkpoint of either backend, rewritten in the portable form."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jaxllm.checkpointing import open_state
from jaxllm.config import RunConfig
from jaxllm.errors import JaxllmError
from jaxllm.families import resolve_model, task_of
from jaxllm.state import write_state


def convert(checkpoint: Path, out: Path) -> None:
    """Write the state in `checkpoint` to `out`, which appears only when it is whole."""
    config = RunConfig.model_validate(json.loads((checkpoint / "checkpoint.json").read_text())["config"])
    model = resolve_model(config.model, task=task_of(config.objective))
    dtype = "float64" if config.training.precision == "fp64" else "float32"
    partial = out.with_name(f"{out.name}.partial")
    write_state(open_state(checkpoint, model), partial, model.huggingface_config, dtype=dtype)
    partial.rename(out)


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except JaxllmError as error:
        sys.exit(str(error))
