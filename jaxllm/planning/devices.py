"""Devices as people write them: `v5p:4x4x8`, `h100x8`, `l4:4`; and those that are looked at when nobody says."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jaxllm.errors import ConfigError
from jaxllm.metrics.chips import GIB, Chip, named_chip

RESERVED = {"gpu": 1.5 * GIB, "tpu": 0.0}
"""Bytes that a program cannot use: on a GPU the CUDA context, its libraries and the collectives' buffers (0.5 to 1.5 GiB are
usual); on a TPU the table has the compiler's own limit, from which they are already taken off."""

FRAGMENTATION = {"gpu": 0.95, "tpu": 0.98}
"""The part of the rest that an allocator fills before it finds no hole that is large enough."""


@dataclass(frozen=True)
class Devices:
    """`chips` chips of one kind.  written: as a person says it."""

    chip: Chip
    chips: int
    written: str

    @property
    def count(self) -> int:
        """Devices that a framework sees."""
        return self.chips * self.chip.devices_per_chip

    @property
    def usable_bytes(self) -> float:
        """Memory of one device that a run can count on."""
        return (self.chip.memory_bytes - RESERVED[self.chip.kind]) * FRAGMENTATION[self.chip.kind]

    @property
    def flops(self) -> float:
        """Peak bf16 FLOP/s of all of them."""
        return self.chip.bf16_flops * self.count


def parse_devices(text: str) -> Devices:
    """Read `NAME:AxB[xC]`, `NAME:N`, `NAMExN` or `NAME` (one).  ConfigError for an unknown chip (with the names) or shape."""
    written = text.strip()
    name, colon, shape = written.partition(":")
    if not colon:
        match = re.fullmatch(r"(.+?)x(\d+)", written, re.IGNORECASE)
        name, shape = (match.group(1), match.group(2)) if match and not _is_chip(written) else (written, "1")
    if not re.fullmatch(r"\d+(x\d+){0,2}", shape):
        raise ConfigError(
            "", f"--chips {text!r}: {shape!r} is no number or shape of chips; write for example h100x8, v5e:4x4 or v5p:4x4x8"
        )
    try:
        chip = named_chip(name)
    except ConfigError as error:
        raise ConfigError("", f"--chips {text!r}: {error.message}") from None
    chips = math.prod(int(size) for size in shape.split("x"))
    if chips == 0:
        raise ConfigError("", f"--chips {text!r}: there must be at least one chip")
    return Devices(chip, chips, written)


def _is_chip(name: str) -> bool:
    try:
        named_chip(name)
    except ConfigError:
        return False
    return True


USUAL = (
    "rtx4090x1", "l4x1", "l40sx1", "a100x1", "h100x1", "h200x1", "b200x1", "mi300xx1", "v5e:2x2", "v5e:2x4", "v6e:2x2",
    "v6e:2x4",
    "l4x8", "a100x8", "h100x8", "h200x8", "b200x8", "mi300xx8", "v5e:4x4", "v6e:4x4", "v5p:2x2x1", "v5p:2x2x2", "tpu7x:2x2x1",
    "a100x64", "h100x64", "h200x64", "v5e:16x16", "v6e:8x8", "v6e:16x16", "v5p:4x4x4", "v5p:4x4x8", "tpu7x:4x4x4",
    "h100x512", "h200x512", "b200x512", "v5p:8x8x8", "v5p:8x16x16", "tpu7x:8x8x8",
)  # fmt: skip
"""What `jaxllm plan` looks at without --chips."""
