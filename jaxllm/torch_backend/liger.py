"""Liger's Triton kernels (arXiv:2410.10989) in a transformers model: RMS norms, rotary positions and gated MLPs.

liger-kernel replaces these in an instance, but rotary positions, and what later models are made of, in the modelling module of
the family, so for every model of the process.  Here the instance alone changes: the modelling module gets back what it had, and
the instance's attention runs the same code with Liger's rotary positions in its globals.

Left to transformers: experts, whose products Liger's kernels leave at Triton's default, TF32 also where the run says fp32; and
the loss, of which `jaxllm.torch_backend.chunked_loss` takes care.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from jaxllm.config.schema import Precision
from jaxllm.errors import BackendError
from jaxllm.families import Model

_ROTARY = "apply_rotary_pos_emb"  # transformers' name, in every modelling module


def check_liger(device: torch.device, precision: Precision) -> None:
    """BackendError unless Liger's kernels are installed and can run on `device`, or in fp32 in Triton's interpreter."""
    missing = [package for package in ("liger_kernel", "triton") if find_spec(package) is None]
    if missing:
        raise BackendError(
            f"deepspeed.liger true needs the package {missing[0]!r}; install it with: pip install 'jaxllm[liger]', "
            "or set it to false"
        )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and precision == "fp32"  # it multiplies the bits of bf16 numbers
    if device.type != "cuda" and not interpreted:
        raise BackendError(
            f"deepspeed.liger true needs a CUDA device, and this run is on the {device.type}; set it to false, or try it "
            "slowly, in fp32, in Triton's interpreter with TRITON_INTERPRET=1 in the environment"
        )


def apply_liger(model: Model, module: Any) -> None:
    """Replace what Liger has kernels for in `module`, the transformers.PreTrainedModel of a `model` that the table allows."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance as apply

    names = vars(sys.modules[type(module).__module__])
    stock = dict(names)
    try:
        # The decoder without its head: of gemma3_text, Liger's function knows no other head than the language model's.
        apply(module.base_model, swiglu=model.spec.mlp.experts is None, cross_entropy=False, fused_linear_cross_entropy=False)
        rotated = {**stock, _ROTARY: names[_ROTARY]}
    finally:
        names.update(stock)
    for attention in module.modules():
        if _ROTARY in type(attention).forward.__code__.co_names:
            attention.forward = MethodType(_with_globals(attention, rotated), attention)


def _with_globals(attention: nn.Module, names: dict[str, Any]) -> FunctionType:
    """The `forward` of an attention module, which looks `names` up instead of its module's."""
    forward: Any = type(attention).forward
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made
