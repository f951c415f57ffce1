"""The meshes that two JAX processes of four devices try, and the same run on one device."""

from __future__ import annotations

from jaxllm.run import Run
from tests.unit.jax_backend.cases import LLAMA, make_run

MODEL = {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 8}
MESHES = {
    "data2-fsdp2-tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    # Both processes hold parts of the same rows.
    "tensor8": {"data": 1, "tensor": 8},
    "context8": {"data": 1, "context": 8},
}


def mesh_run(name: str) -> Run:
    """The run of one mesh over eight devices, four in each process."""
    training = {"precision": "fp64", "micro_batch": 2}
    return make_run(MODEL, training=training, parallel=MESHES[name], jax={"cpu_devices": 4})


def single_run() -> Run:
    """The same on one device."""
    return make_run(MODEL, training={"precision": "fp64"})
