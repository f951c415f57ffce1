from __future__ import annotations

import pytest

from jaxllm.errors import ConfigError
from jaxllm.metrics.chips import CHIPS, find_chip, named_chip, peak_flops


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("AMD Instinct MI300X", "MI300X"),
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


def test_a_written_name_finds_its_chip_and_an_unknown_one_lists_them_all() -> None:
    assert named_chip("h100").name == "H100 SXM"
    assert named_chip("A100-40GB").memory_bytes < named_chip("a100").memory_bytes
    assert all(named_chip(chip.key) is chip and named_chip(chip.name) is chip for chip in CHIPS)
    with pytest.raises(ConfigError, match=r"unknown chip 'h10'; did you mean 'h100'\? \(allowed: .*v5p.*\)"):
        named_chip("h10")


def test_names_are_distinct() -> None:
    written = [name for chip in CHIPS for name in (chip.key, *chip.aliases)]
    assert len(written) == len(set(written))


def test_every_row_is_plausible() -> None:
    """A digit too many or too few shows in ratios that no real accelerator has."""
    for chip in CHIPS:
        assert 7 * 2**30 < chip.memory_bytes < 200 * 2**30
        assert 50 < chip.bf16_flops / chip.bandwidth < 700, chip.name  # FLOPs per byte of memory traffic
        assert 3 < chip.bandwidth / chip.interconnect < 32, chip.name
        assert (chip.link_bandwidth is not None) == (chip.kind == "tpu")


def test_tpu_clocks_give_what_the_matrix_units_can_do() -> None:
    """128 x 128 multiply-adds, as many units as the generation has (arXiv:2304.01433 for v4), or of 256 x 256 from v6e on."""
    per_cycle = {
        "v4": 8 * 2 * 128**2,
        "v5e": 4 * 2 * 128**2,
        "v5p": 8 * 2 * 128**2,
        "v6e": 4 * 2 * 256**2,
        "tpu7x": 4 * 2 * 256**2,
    }
    for key, flops in per_cycle.items():
        assert named_chip(key).flops_per_cycle == pytest.approx(flops, rel=0.01)
