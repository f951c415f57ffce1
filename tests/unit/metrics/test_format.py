from __future__ import annotations

import math

import pytest

from jaxllm.metrics import format as show


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (0.5, "0.50"), (12.34, "12.3"), (999.7, "1.00k"), (1000, "1.00k"), (12345, "12.3k"),
     (123456, "123k"), (999_600, "1.00M"), (1_228_800, "1.23M"), (15e12, "15.0T"), (-2500, "-2.50k"), (5e18, "5000P")],
)  # fmt: skip
def test_count(value: float, text: str) -> None:
    assert show.count(value) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1288490189, "1.2 GiB"),
        (2**30 - 1, "1.0 GiB"),
        (3 * 2**50, "3072.0 TiB"),
    ],
)
def test_memory(size: int, text: str) -> None:
    assert show.memory(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.4, "0s"), (59.6, "1m 00s"), (83, "1m 23s"), (3600, "1h 00m"), (7384, "2h 03m"), (90061, "1d 1h"), (-1, "0s"),
     (math.inf, "?"), (math.nan, "?")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert show.duration(seconds) == text


def test_sparkline_falls_with_the_values_and_keeps_its_width() -> None:
    assert show.sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert show.sparkline([1.0, 2.0], 30) == "▁█"
    long = show.sparkline([1000.0 - step for step in range(997)], 30)
    assert len(long) == 30
    assert list(long) == sorted(long, reverse=True)
    assert show.sparkline([3.0, 3.0, 3.0], 30) == "▁▁▁"
    assert show.sparkline([], 30) == show.sparkline([math.nan], 30) == ""
    assert show.sparkline([2.0, math.nan, math.inf, 1.0], 30) == "█▁"
