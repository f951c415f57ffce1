"""Peak dense bf16 rate of accelerators, by the name that the device reports to JAX or PyTorch.

NVIDIA's data sheets print tensor-core rates with 2:4 sparsity; the table holds half of those.  Rates with fp32 accumulation.
A framework's device is not always a chip: TPU v2, v3 and tpu7x show two devices per chip (one per TensorCore), v4 and v5p one
(jax/_src/pallas/mosaic/tpu_info.py).  The table is per device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from jaxllm.config.schema import Precision

_HOPPER = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"
_BLACKWELL = "https://resources.nvidia.com/en-us-blackwell-architecture (HGX B200, GB200 NVL72)"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_TPU = "https://cloud.google.com/tpu/docs/system-architecture-tpu-vm"


@dataclass(frozen=True)
class Chip:
    """An accelerator.  bf16_flops: peak dense bf16 FLOP/s of one framework device; source: where that is published."""

    name: str
    pattern: str
    bf16_flops: float
    source: str


# The first pattern that is found in the reported name wins, so the particular stand before the general.
CHIPS: tuple[Chip, ...] = (
    Chip("GB200", r"\bGB200\b", 2500e12, _BLACKWELL),
    Chip("B200", r"\bB200\b", 2250e12, _BLACKWELL),
    Chip("H200 NVL", r"\bH200 NVL\b", 835.5e12, _H200),
    Chip("H200", r"\bH200\b", 989.5e12, _H200),
    Chip("GH200", r"\bGH200\b", 989.5e12, "https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip"),
    Chip("H100 PCIe", r"\bH100 PCIe\b", 756.5e12, _HOPPER),
    Chip("H100 NVL", r"\bH100 NVL\b", 835.5e12, _HOPPER),
    Chip("H100 SXM", r"\bH100 (SXM5?|\d+GB HBM3)\b", 989.5e12, _HOPPER),
    Chip("A100", r"\bA100\b", 312e12, "https://www.nvidia.com/en-us/data-center/a100/"),
    Chip("L40S", r"\bL40S\b", 362e12, "https://www.nvidia.com/en-us/data-center/l40s/"),
    Chip("L4", r"\bL4\b", 121e12, "https://www.nvidia.com/en-us/data-center/l4/"),
    Chip("RTX 4090", r"\bRTX 4090\b(?! Laptop| D)", 165.2e12, _ADA),
    Chip("TPU v2", r"^TPU v2\b", 23e12, _TPU),
    Chip("TPU v3", r"^TPU v3\b", 61.5e12, _TPU),
    Chip("TPU v4", r"^TPU v4$", 275e12, "https://cloud.google.com/tpu/docs/v4"),
    Chip("TPU v5e", r"^TPU v5( lite|e)\b", 197e12, "https://cloud.google.com/tpu/docs/v5e"),
    Chip("TPU v5p", r"^TPU v5p?$", 459e12, "https://cloud.google.com/tpu/docs/v5p"),
    Chip("TPU v6e", r"^TPU v6( lite|e)\b", 918e12, "https://cloud.google.com/tpu/docs/v6e"),
    Chip("tpu7x", r"^TPU ?(v)?7x\b", 2307e12 / 2, "https://cloud.google.com/tpu/docs/tpu7x"),
)


def find_chip(device_name: str | None) -> Chip | None:
    """The chip that a device reports to be, for example `NVIDIA H100 80GB HBM3` or `TPU v5 lite`; None when it is not known."""
    if device_name is None or " MIG " in device_name:  # a slice of a chip has a fraction of its peak
        return None
    return next((chip for chip in CHIPS if re.search(chip.pattern, device_name, re.IGNORECASE)), None)


def peak_flops(device_name: str | None, devices: int, precision: Precision) -> float | None:
    """Peak FLOP/s of `devices` devices, the denominator of MFU; None unless the chip is known and the precision is bf16.

    There is no figure for fp32 because its peak depends on whether the hardware may round the factors to TF32 or bf16.
    """
    chip = find_chip(device_name)
    return chip.bf16_flops * devices if chip is not None and precision == "bf16" else None
