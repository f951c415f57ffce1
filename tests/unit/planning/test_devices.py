from __future__ import annotations

import pytest

from jaxllm.errors import ConfigError
from jaxllm.metrics.chips import CHIPS
from jaxllm.planning.devices import USUAL, parse_devices


@pytest.mark.parametrize(
    ("written", "chip", "chips", "devices"),
    [
        ("h100x8", "H100 SXM", 8, 8),
        ("H100", "H100 SXM", 1, 1),
        ("h100-pcie:4", "H100 PCIe", 4, 4),
        ("v5p:4x4x8", "TPU v5p", 128, 128),
        ("v5e:16x16", "TPU v5e", 256, 256),
        ("tpu7x:2x2x1", "tpu7x", 4, 8),
        ("tpu7x", "tpu7x", 1, 2),
        ("l40sx2", "L40S", 2, 2),
        ("mi300xx8", "MI300X", 8, 8),
        ("a100-40x16", "A100 40GB", 16, 16),
    ],
)
def test_what_people_write(written: str, chip: str, chips: int, devices: int) -> None:
    found = parse_devices(written)
    assert (found.chip.name, found.chips, found.count) == (chip, chips, devices)
    assert 0.85 * found.chip.memory_bytes < found.usable_bytes < found.chip.memory_bytes


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("h10x8", r"--chips 'h10x8': unknown chip 'h10'; did you mean 'h100'\? \(allowed: .*v5p"),
        ("v5p:4x4x", r"--chips 'v5p:4x4x': '4x4x' is no number or shape of chips; write for example h100x8"),
        ("v5p:0", r"--chips 'v5p:0': there must be at least one chip"),
        ("", r"--chips '': unknown chip ''"),
    ],
)
def test_what_cannot_be_read_is_said(written: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_devices(written)


def test_the_usual_devices_are_known_and_of_many_kinds() -> None:
    kinds = {parse_devices(each).chip.key for each in USUAL}
    assert kinds <= {chip.key for chip in CHIPS}
    assert {"h100", "v5e", "v5p", "v6e", "tpu7x", "l4"} <= kinds
