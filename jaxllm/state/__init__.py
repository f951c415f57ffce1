"""TrainingState: the portable checkpoint, and its store on disk."""

from jaxllm.state.portable import is_portable, read_state, write_state, write_weights
from jaxllm.state.safetensors_files import SafetensorsReader, write_safetensors
from jaxllm.state.training_state import Progress, TensorReader, TrainingState

__all__ = [
    "Progress",
    "SafetensorsReader",
    "TensorReader",
    "TrainingState",
    "is_portable",
    "read_state",
    "write_safetensors",
    "write_state",
    "write_weights",
]
