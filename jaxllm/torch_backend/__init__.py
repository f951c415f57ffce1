"""The PyTorch + DeepSpeed backend: the Hugging Face model of the family, trained under a DeepSpeed engine.

`DeepSpeedBackend` implements `jaxllm.backend.Backend`.  It is imported on first use, so that `launch`, which only starts
other processes, does not pay for DeepSpeed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.torch_backend.backend import DeepSpeedBackend

__all__ = ["DeepSpeedBackend"]


def __getattr__(name: str) -> Any:
    if name == "DeepSpeedBackend":
        from jaxllm.torch_backend.backend import DeepSpeedBackend

        return DeepSpeedBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
