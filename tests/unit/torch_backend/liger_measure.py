"""What Liger's kernels change, in a process of its own: a CUDA device, or else Triton's interpreter, is chosen at its start.

`python -m tests.unit.torch_backend.liger_measure` prints JSON: for every family the error of loss, logits and gradients of one
pass, relative to the same model without Liger (the measure of `jaxllm.parity.tolerances`), and what was replaced in it.  With
the argument `training`: losses and gradient norms of two steps in DeepSpeed without and with Liger, for every case.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch

from jaxllm.backend import create_backend
from jaxllm.families import flatten
from jaxllm.parity.tolerances import gradient_error, relative_error
from jaxllm.probe import Pass
from jaxllm.run import Run
from jaxllm.torch_backend.combinations import LIGER_ACTIVATIONS
from jaxllm.torch_backend.liger import apply_liger
from jaxllm.torch_backend.probe import TorchProbe
from tests.distributed.deepspeed_cases import make_batch, make_hyper, make_run, random_state

CASES: dict[str, dict[str, Any]] = {
    "fp32 zero3 activation_checkpointing": {"zero_stage": 3, "activation_checkpointing": True},
}
if torch.cuda.is_available():  # the interpreter multiplies bf16 numbers as if their bits were whole numbers
    CASES["bf16 zero2"] = {"precision": "bf16", "zero_stage": 2}


def complete_interpreter() -> None:
    """Give Triton's interpreter what these kernels need and it lacks: scalars that are no Python floats, and libdevice."""
    import liger_kernel.ops.geglu
    import liger_kernel.ops.rms_norm
    import triton.language as tl
    from triton.runtime import interpreter

    as_it_is = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):  # compiled kernels are given it in fp32
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return as_it_is(argument)

    def elementwise(function: Any) -> Any:
        return lambda x: tl.tensor(interpreter.TensorHandle(function(x.handle.data), x.handle.dtype), x.type)

    interpreter._implicit_cvt = converted
    liger_kernel.ops.rms_norm.rsqrt = elementwise(lambda x: 1 / np.sqrt(x))
    liger_kernel.ops.geglu.tanh = elementwise(np.tanh)


def measured(family: str) -> dict[str, Any]:
    """Errors of one pass in fp32, and how many modules of each kind compute otherwise than before."""
    run = make_run(f"tiny-{family}")
    probe = TorchProbe()
    probe.load(run, random_state(run).params)
    batch = make_batch(0)
    stock = probe.passes(batch)
    module = probe._model[1].model
    apply_liger(run.model, module)
    replaced: dict[str, int] = {}
    for each in module.modules():
        if "forward" in vars(each) and not isinstance(each, torch.nn.Linear):  # the head is jaxllm's
            replaced[each._get_name()] = replaced.get(each._get_name(), 0) + 1
    again = TorchProbe()  # a model that is made later is transformers' own
    again.load(run, random_state(run).params)
    return {
        "replaced": replaced,
        "errors": _errors(run, probe.passes(batch), stock),
        "untouched": _errors(run, again.passes(batch), stock),
    }


def _errors(run: Run, found: Pass, wanted: Pass) -> dict[str, float]:
    largest = max(float(np.abs(gradient).max()) for gradient in wanted.gradients.values())
    idle = {name: rule.idle for name, rule, _ in flatten(run.model.rules)}
    gradients = [gradient_error(found.gradients[n], wanted.gradients[n], largest, idle=idle[n]) for n in idle]
    return {
        "loss": relative_error(found.loss, wanted.loss),
        "logits": relative_error(found.logits, wanted.logits),
        "gradients": max(gradients),
    }


def trained(liger: bool, **options: Any) -> list[float]:
    """Loss and gradient norm of two steps in DeepSpeed."""
    backend = create_backend("deepspeed")
    backend.start(make_run("tiny-qwen3", model={"num_hidden_layers": 1}, liger=liger, **options), None)
    steps = [backend.step(make_batch(step), make_hyper(step)) for step in range(2)]
    backend.close()
    return [float(value) for step in steps for value in (step.loss, step.gradient_norm)]


if __name__ == "__main__":
    if not torch.cuda.is_available():
        complete_interpreter()
    training = sys.argv[1:] == ["training"]
    print(  # noqa: T201 - its output
        json.dumps(
            {name: [trained(liger, **options) for liger in (False, True)] for name, options in CASES.items()}
            if training
            else {family: measured(family) for family in LIGER_ACTIVATIONS}
        )
    )
