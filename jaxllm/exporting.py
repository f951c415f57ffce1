"""Writing a trained model as the folder that `save_pretrained` would have written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxllm.checkpointing import open_state
from jaxllm.errors import JaxllmError
from jaxllm.generation.load import load_trained
from jaxllm.state import write_weights

_OF_DECODER = ("pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    step: int
    parameters: int


def export_run(run: Path, out: Path, step: int | None, dtype: str, report: Callable[[str], None]) -> Exported:
    """Write the weights, config and tokenizer of a run's checkpoint to `out`, which must be new.

    step: of the checkpoint (None: the newest whole one).  dtype: float32, float64 or bfloat16.  `out` appears only when it is
    whole.  Raises JaxllmError.
    """
    if out.exists():
        raise JaxllmError(f"{out} already exists; choose a new folder or remove it")
    trained = load_trained(run, step, report)
    if trained.checkpoint is None:
        raise JaxllmError(f"{run} is a model folder already; transformers loads it as it is")
    os.environ["JAX_PLATFORMS"] = "cpu"  # a checkpoint that JAX wrote is read on the host, whatever devices there are
    model = trained.run.model
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_weights(open_state(trained.checkpoint.folder, model), partial, model.huggingface_config, dtype=dtype)
        special = ("bos_token_id", "eos_token_id") + (_OF_DECODER if model.spec.encoder is not None else ())
        generation = {"_from_model_config": True, **{key: model.huggingface_config.get(key) for key in special}}
        (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        trained.tokenizer.save(partial)
        partial.rename(out)
    except OSError as error:
        raise JaxllmError(f"cannot write {out} ({error.strerror}); free disk space or choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(trained.checkpoint.step, model.parameters)
