from __future__ import annotations

import pytest

from jaxllm.metrics.chips import CHIPS, find_chip, peak_flops


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("TPU v2", "TPU v2"),
        ("TPU v3", "TPU v3"),
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5e", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("TPU v6e", "TPU v6e"),
        ("TPU7x", "tpu7x"),
    ],
)
def test_reported_names(reported: str, name: str) -> None:
    chip = find_chip(reported)
    assert chip is not None
    assert chip.name == name


@pytest.mark.parametrize(
    "reported",
    [
        None,
        "cpu",
        "AMD EPYC",
        "NVIDIA L40",
        "NVIDIA A10",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "TPU v4 lite",
        "TPU v9",
        "NVIDIA H1000",
    ],
)
def test_unknown_devices_have_no_peak(reported: str | None) -> None:
    assert find_chip(reported) is None
    assert peak_flops(reported, 8, "bf16") is None


def test_every_chip_is_found_by_its_own_pattern_and_has_a_source() -> None:
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    assert all(chip.source.startswith("https://") and 1e13 < chip.bf16_flops < 1e16 for chip in CHIPS)


def test_peak_counts_all_devices_and_exists_only_for_bf16() -> None:
    assert peak_flops("TPU v5 lite", 4, "bf16") == 4 * 197e12
    assert peak_flops("TPU v5 lite", 4, "fp32") is None
    assert peak_flops("TPU v5 lite", 4, "fp64") is None
    # JAX shows a tpu7x chip as two devices.
    assert peak_flops("TPU7x", 2, "bf16") == 2307e12
