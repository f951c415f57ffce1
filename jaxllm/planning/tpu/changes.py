"""Changes of a run file that leave what is learnt as it is: how the same step is laid out and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jaxllm.config import RunConfig

Changes = Mapping[str, object]
"""Values by dotted key."""

AXES = ("data", "fsdp", "tensor", "context", "expert")


def changed(config: RunConfig, changes: Changes) -> RunConfig:
    """The run file with other values of some keys; ConfigError comes later, from whoever uses it."""
    sections: dict[str, dict[str, object]] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    update = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=update)


def spelled(changes: Changes) -> str:
    """As options for a shell: `--set jax.remat=full --set training.micro_batch=1`; `as it is` for none."""
    return " ".join(f"--set {_quoted(f'{key}={_value(value)}')}" for key, value in changes.items()) or "as it is"


def _quoted(text: str) -> str:
    return f"'{text}'" if "[" in text else text


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value)


def sizes_of(config: RunConfig, devices: int) -> dict[str, int]:
    """Size of every mesh axis on `devices` devices, `data: -1` resolved (rounded down when it does not divide)."""
    sizes = {axis: int(getattr(config.parallel, axis)) for axis in AXES}
    if sizes["data"] == -1:
        sizes["data"] = max(1, devices // math.prod(size for axis, size in sizes.items() if axis != "data"))
    return sizes


def rows_per_device(config: RunConfig, devices: int) -> int:
    """Sequences of one step for every device (or group of devices) that sees rows of its own."""
    sizes = sizes_of(config, devices)
    return max(1, config.training.global_batch // (sizes["data"] * sizes["fsdp"] * sizes["expert"]))


def micro_batch_of(config: RunConfig, devices: int) -> int:
    """Sequences per device and forward pass."""
    return config.training.micro_batch or rows_per_device(config, devices)
