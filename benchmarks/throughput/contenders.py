"""Who is compared: each with the module that its process runs, its environment, and what it is to be held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.throughput.cases import Case
from benchmarks.throughput.environments import HERE, Environment

# Where constraints.txt has a version it is taken, so that the same torch and transformers are compared with themselves.
_TORCH = Environment("torch", ("torch", "transformers", "numpy", "safetensors"))
_TRAINER = Environment("trainer", ("torch", "transformers", "accelerate", "deepspeed", "numpy", "safetensors"))
_LITGPT = Environment("litgpt", ("litgpt", "torch", "numpy", "safetensors"), only=("torch",))
_JAX = Environment("jax", ("jax", "optax", "numpy", "safetensors"))
_JAX_CUDA = Environment("jax-cuda", ("jax[cuda13]", "optax", "numpy", "safetensors"))


@dataclass(frozen=True)
class Contender:
    """worker: a module of benchmarks.throughput.workers.  environment: on a CPU; cuda: on a GPU, where it is another.

    devices: those that it is measured on.
    """

    name: str
    worker: str
    environment: Environment
    options: Mapping[str, Any] = field(default_factory=dict)
    cuda: Environment | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")

    def environment_on(self, device: str) -> Environment:
        """The environment that its process runs in."""
        return self.cuda if device == "cuda" and self.cuda is not None else self.environment

    def options_for(self, case: Case) -> dict[str, Any]:
        """Its own options, and what jaxllm's run file says of this case."""
        options = dict(self.options)
        if options.get("backend") == "deepspeed":
            options["deepspeed"] = {**case.deepspeed, **options.get("deepspeed", {})}
        elif options.get("backend") == "jax":
            options["jax"] = {**case.jax, **options.get("jax", {})}
        else:
            options["checkpoint"] = bool(case.deepspeed.get("activation_checkpointing"))
        return options


def _zero(stage: int) -> dict[str, Any]:
    return {"backend": "deepspeed", "deepspeed": {"zero_stage": stage}}


JAXLLM_JAX = Contender("jaxllm jax", "jaxllm_backend", HERE, {"backend": "jax"})
JAXLLM_BARE = Contender("jaxllm jax, bare loop", "jaxllm_bare", HERE, {"backend": "jax"})
PLAIN_JAX = Contender("plain jax", "plain_jax", _JAX, cuda=_JAX_CUDA)
ZERO = tuple(Contender(f"jaxllm deepspeed, zero {stage}", "jaxllm_backend", HERE, _zero(stage)) for stage in (0, 2, 3))
EAGER = Contender("torch eager", "torch_loop", _TORCH)
COMPILED = Contender("torch compile", "torch_loop", _TORCH, {"compile": True})
TRAINER = tuple(
    Contender(f"transformers trainer, zero {stage}", "hf_trainer", _TRAINER, {"zero_stage": stage}) for stage in (0, 2, 3)
)
# What can be chosen on a GPU, each against what the case sets.
_JAX_CHOICES = (*(("remat", policy) for policy in ("none", "products", "dots", "full")), ("attention", "xla"))
_CHOICES = (
    *((f"jax, {key} {value}", {"backend": "jax", "jax": {key: value}}) for key, value in _JAX_CHOICES),
    *(
        (f"deepspeed, zero 0, {key}", {"backend": "deepspeed", "deepspeed": {"zero_stage": 0, key: True}})
        for key in ("torch_compile", "liger")
    ),
)
CHOICES = tuple(Contender(f"jaxllm {name}", "jaxllm_backend", HERE, options, devices=("cuda",)) for name, options in _CHOICES)
LITGPT = Contender("litgpt", "litgpt_loop", _LITGPT)

CONTENDERS = (
    JAXLLM_JAX, ZERO[0], EAGER, TRAINER[0], COMPILED, LITGPT, PLAIN_JAX, JAXLLM_BARE, ZERO[1], TRAINER[1], ZERO[2], TRAINER[2],
    *CHOICES,
)  # fmt: skip
"""In the order in which they run: where time is short, the last ones are left out."""

TARGETS = (
    (JAXLLM_JAX.name, EAGER.name, 1.0),
    (JAXLLM_JAX.name, PLAIN_JAX.name, 1.0),
    (JAXLLM_JAX.name, JAXLLM_BARE.name, 0.97),
    *((ours.name, theirs.name, 1.0) for ours, theirs in zip(ZERO, TRAINER, strict=True)),
)
"""Speed of the first over that of the second, and what it is to be at least."""
