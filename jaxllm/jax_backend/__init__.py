"""Training on JAX: a Flax NNX Transformer, sharded with `jax.jit` over a TPU, GPU or CPU mesh.

`JaxBackend` is the whole public surface.  It is loaded when it is asked for, so that `jaxllm.jax_backend.launch` can start
worker processes from a parent that never loads JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.jax_backend.backend import JaxBackend

__all__ = ["JaxBackend"]


def __getattr__(name: str) -> Any:
    if name == "JaxBackend":
        from jaxllm.jax_backend.backend import JaxBackend

        return JaxBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
