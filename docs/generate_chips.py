"""Write docs/chips.md, the table of accelerators, from `jaxllm.metrics.chips`.

python docs/generate_chips.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from jaxllm.metrics.chips import CHIPS, GIB, Chip
from jaxllm.planning.utilization import PUBLISHED

PAGE = Path(__file__).with_name("chips.md")

INTRODUCTION = """\
# Chips

<!-- Written by docs/generate_chips.py from jaxllm/metrics/chips.py and jaxllm/planning/utilization.py; do not edit. -->

What [`jaxllm plan`](planning.md) and MFU know of accelerators. Every number is of one framework device: a TPU v2, v3 or tpu7x
chip is two of them. Memory is what a program may use: what a GPU's driver reports, and on TPUs the compiler's limit. Peak is
dense bf16 with fp32 accumulation; links are all of a device's links to its neighbours together, one way.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_chips(), "", *_utilization(), ""])


def _chips() -> Iterator[str]:
    yield "| `--chips` | chip | memory, GiB | bf16 peak, TFLOP/s | memory bandwidth, GB/s | links, GB/s | clock, GHz | source |"
    yield "|---|---|---|---|---|---|---|---|"
    for chip in CHIPS:
        names = ", ".join(f"`{name}`" for name in (chip.key, *chip.aliases))
        memory, peak = f"{chip.memory_bytes / GIB:.2f}", f"{chip.bf16_flops / 1e12:g}"
        rates = [f"{rate / 1e9:g}" for rate in (chip.bandwidth, chip.interconnect)]
        yield "| " + " | ".join((names, chip.name, memory, peak, *rates, _clock(chip), chip.source)) + " |"


def _clock(chip: Chip) -> str:
    return "" if chip.clock_hz is None else f"{chip.clock_hz / 1e9:g}"


def _utilization() -> Iterator[str]:
    yield "## Published utilisation"
    yield ""
    yield "What a plan's time rests on: the median of the three rows of a chip that are nearest to the model in size."
    yield ""
    yield "| chips | run | MFU | attention counted | source |"
    yield "|---|---|---|---|---|"
    for each in PUBLISHED:
        yield f"| {', '.join(each.chips)} | {each.what} | {each.mfu:.2%} | {each.attention} | {each.source} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
