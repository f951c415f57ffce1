"""DeepSpeed, imported the way jaxllm wants it: on the accelerator that is there, without building kernels, without chatter.

The one place that sets environment variables for it.
"""

from __future__ import annotations

import logging
import os
import warnings
from types import ModuleType

import torch


def import_deepspeed() -> ModuleType:
    """The `deepspeed` module, set up once."""
    # DeepSpeed looks for accelerators itself, by trying to import what each needs; torch already knows the answer.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with warnings.catch_warnings():
        # Deprecations inside DeepSpeed's own modules, met while they are imported.
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops
        import deepspeed.runtime.bf16_optimizer

    # With nothing "compatible", DeepSpeed does not compile its shared-memory collective (2 minutes) when a group starts;
    # jaxllm uses torch's own optimisers and collectives throughout.
    deepspeed.ops.__compatible_ops__ = {}
    # It prints a memory report for every parameter group, whatever the log level.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = _say_nothing
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    module: ModuleType = deepspeed
    return module


def _say_nothing(*args: object, **kwargs: object) -> None:
    """In place of DeepSpeed's forced memory reports."""
