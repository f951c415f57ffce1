"""Accelerators: peak rates, memory and links, by the name that a device reports and by the name that people write.

NVIDIA's and AMD's data sheets print matrix rates with 2:4 sparsity too; the table holds the dense ones, with fp32 accumulation.
A framework's device is not always a chip: TPU v2, v3 and tpu7x show two devices per chip (one per TensorCore), v4 and v5p one
(jax/_src/pallas/mosaic/tpu_info.py).  Every number is per device, so two of them make a tpu7x chip.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from jaxllm.config.messages import nearest
from jaxllm.config.schema import Precision
from jaxllm.errors import ConfigError

GIB, MIB = 2**30, 2**20

_AMPERE = "https://www.nvidia.com/en-us/data-center/a100/"
_HOPPER = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"
_BLACKWELL = "https://resources.nvidia.com/en-us-blackwell-architecture (HGX B200, GB200 NVL72)"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_TPU = "https://cloud.google.com/tpu/docs/system-architecture-tpu-vm"


@dataclass(frozen=True)
class Chip:
    """An accelerator, all numbers for one framework device.

    key: what a person writes (`h100x8`).  pattern: found in the name that the device reports.  bf16_flops: peak dense bf16
    FLOP/s.  memory_bytes: what a program may use: for GPUs the total that the driver reports (ECC taken off), for TPUs the
    compiler's limit.  bandwidth: bytes/s of that memory.  interconnect: bytes/s that the device sends over all its links to
    its neighbours at once, one way (data sheets print both ways together); without NVLink or ICI that is PCIe.  links: ICI
    links per chip.  devices_per_chip, chips_per_host: as said.  clock_hz: of a TPU's TensorCores; None where it is not known.
    """

    name: str
    key: str
    kind: Literal["gpu", "tpu"]
    pattern: str
    bf16_flops: float
    memory_bytes: int
    bandwidth: float
    interconnect: float
    source: str
    clock_hz: float | None = None
    devices_per_chip: int = 1
    chips_per_host: int = 8
    links: int = 0
    aliases: tuple[str, ...] = ()

    @property
    def flops_per_cycle(self) -> float | None:
        """Peak bf16 FLOPs in one cycle of a TPU's clock."""
        return None if self.clock_hz is None else self.bf16_flops / self.clock_hz

    @property
    def link_bandwidth(self) -> float | None:
        """Bytes/s of one ICI link, one way."""
        return self.interconnect * self.devices_per_chip / self.links if self.links else None


def _gpu(
    name: str,
    key: str,
    pattern: str,
    teraflops: float,
    memory_mib: int,
    bandwidth_gb: float,
    both_ways_gb: float,
    source: str,
    aliases: tuple[str, ...] = (),
) -> Chip:
    """A row as data sheets give it: dense TFLOP/s, MiB that the driver reports, GB/s, GB/s of the links both ways together."""
    rates = (teraflops * 1e12, memory_mib * MIB, bandwidth_gb * 1e9, both_ways_gb * 1e9 / 2)
    return Chip(name, key, "gpu", pattern, *rates, source, aliases=aliases)


def _tpu(  # noqa: PLR0913 - one row of the table
    name: str,
    key: str,
    pattern: str,
    teraflops: float,
    memory_gib: float,
    bandwidth_gb: float,
    both_ways_gb: float,
    source: str,
    *,
    links: int,
    clock_ghz: float | None = None,
    devices: int = 1,
    chips_per_host: int = 4,
    aliases: tuple[str, ...] = (),
) -> Chip:
    """A row as Google gives it, per chip; memory_gib is the compiler's limit for one device."""
    rates = (teraflops * 1e12 / devices, int(memory_gib * GIB), bandwidth_gb * 1e9 / devices, both_ways_gb * 1e9 / 2 / devices)
    clock = None if clock_ghz is None else clock_ghz * 1e9
    return Chip(name, key, "tpu", pattern, *rates, source, clock, devices, chips_per_host, links, aliases)


# The first pattern that is found in the reported name wins, so the particular stand before the general.
# The columns: see _gpu and _tpu.  TPU clocks: cycles x rate give the published peak (v4 and v5p with both cores together); the
# TensorCore's width and clock are in jax/_src/pallas/mosaic/tpu_info.py and arXiv:2304.01433.
CHIPS: tuple[Chip, ...] = (
    _gpu("GB200", "gb200", r"\bGB200\b", 2500, 189471, 8000, 1800, _BLACKWELL),
    _gpu("B200", "b200", r"\bB200\b", 2250, 183359, 8000, 1800, _BLACKWELL),
    _gpu("H200 NVL", "h200-nvl", r"\bH200 NVL\b", 835.5, 143771, 4800, 900, _H200),
    _gpu("H200", "h200", r"\bH200\b", 989.5, 143771, 4800, 900, _H200),
    _gpu("GH200", "gh200", r"\bGH200\b", 989.5, 97871, 4000, 900,
         "https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip"),
    _gpu("H100 PCIe", "h100-pcie", r"\bH100 PCIe\b", 756.5, 81559, 2000, 128, _HOPPER),
    _gpu("H100 NVL", "h100-nvl", r"\bH100 NVL\b", 835.5, 95830, 3900, 600, _HOPPER),
    _gpu("H100 SXM", "h100", r"\bH100 (SXM5?|\d+GB HBM3)\b", 989.5, 81559, 3350, 900, _HOPPER, ("h100-sxm",)),
    _gpu("A100 40GB", "a100-40", r"\bA100\b.*\b40GB\b", 312, 40960, 1555, 600, _AMPERE, ("a100-40gb",)),
    _gpu("A100 80GB", "a100", r"\bA100\b", 312, 81920, 2039, 600, _AMPERE, ("a100-80", "a100-80gb")),
    _gpu("L40S", "l40s", r"\bL40S\b", 362, 46068, 864, 64, "https://www.nvidia.com/en-us/data-center/l40s/"),
    _gpu("L4", "l4", r"\bL4\b", 121, 23034, 300, 64, "https://www.nvidia.com/en-us/data-center/l4/"),
    _gpu("RTX 4090", "rtx4090", r"\bRTX 4090\b(?! Laptop| D)", 165.2, 24564, 1008, 64, _ADA, ("rtx-4090", "4090")),
    _gpu("MI300X", "mi300x", r"\bMI300X\b", 1307.4, 196592, 5300, 896,
         "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"),
    _tpu("TPU v2", "v2", r"^TPU v2\b", 46, 7.5, 700, 200, _TPU, links=4, clock_ghz=0.7, devices=2),
    _tpu("TPU v3", "v3", r"^TPU v3\b", 123, 15.5, 900, 262, _TPU, links=4, clock_ghz=0.94, devices=2),
    _tpu("TPU v4", "v4", r"^TPU v4$", 275, 30.75, 1200, 600, "https://cloud.google.com/tpu/docs/v4", links=6, clock_ghz=1.05),
    _tpu("TPU v5e", "v5e", r"^TPU v5( lite|e)\b", 197, 15.75, 819, 400, "https://cloud.google.com/tpu/docs/v5e", links=4,
         clock_ghz=1.5, chips_per_host=8, aliases=("v5litepod",)),
    _tpu("TPU v5p", "v5p", r"^TPU v5p?$", 459, 95.74, 2765, 1200, "https://cloud.google.com/tpu/docs/v5p", links=6,
         clock_ghz=1.75),
    _tpu("TPU v6e", "v6e", r"^TPU v6( lite|e)\b", 918, 31.25, 1638, 800, "https://cloud.google.com/tpu/docs/v6e", links=4,
         clock_ghz=1.75, chips_per_host=8, aliases=("trillium",)),
    _tpu("tpu7x", "tpu7x", r"^TPU ?(v)?7x\b", 2307, 94.75, 7380, 1200, "https://cloud.google.com/tpu/docs/tpu7x", links=6,
         clock_ghz=2.2, devices=2, aliases=("v7x", "ironwood")),
)  # fmt: skip


def find_chip(device_name: str | None) -> Chip | None:
    """The chip that a device reports to be, for example `NVIDIA H100 80GB HBM3` or `TPU v5 lite`; None when it is not known."""
    if device_name is None or " MIG " in device_name:  # a slice of a chip has a fraction of its peak
        return None
    return next((chip for chip in CHIPS if re.search(chip.pattern, device_name, re.IGNORECASE)), None)


def named_chip(written: str) -> Chip:
    """The chip that a person means, for example `h100` or `v5p`.  ConfigError, with every name there is, for an unknown one."""
    wanted = written.strip().lower().replace("_", "-")
    for chip in CHIPS:
        if wanted in (chip.key, chip.name.lower(), *chip.aliases):
            return chip
    raise ConfigError("", f"unknown chip {written!r}; {nearest(wanted, [chip.key for chip in CHIPS])}")


def peak_flops(device_name: str | None, devices: int, precision: Precision) -> float | None:
    """Peak FLOP/s of `devices` devices, the denominator of MFU; None unless the chip is known and the precision is bf16.

    There is no figure for fp32 because its peak depends on whether the hardware may round the factors to TF32 or bf16.
    """
    chip = find_chip(device_name)
    return chip.bf16_flops * devices if chip is not None and precision == "bf16" else None
