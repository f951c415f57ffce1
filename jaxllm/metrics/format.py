"""Numbers as people read them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"


def count(value: float) -> str:
    """Three significant digits with a decimal suffix: 12345 -> 12.3k."""
    size, suffixes = float(value), ["", "k", "M", "G", "T", "P"]
    while abs(size) >= 999.5 and len(suffixes) > 1:
        size /= 1000
        suffixes.pop(0)
    whole = suffixes[0] == "" and float(value).is_integer()
    digits = 0 if whole or abs(size) >= 99.95 else 1 if abs(size) >= 9.995 else 2
    return f"{size:.{digits}f}{suffixes[0]}"


def memory(size: float) -> str:
    """Bytes in binary units: 1288490189 -> 1.2 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    value = float(size)
    while value >= 1023.95 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def duration(seconds: float) -> str:
    """The two largest units: 83 -> 1m 23s, 90061 -> 1d 1h."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(round(seconds), 0)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of finite values as a line of bars, at most `width` of them, each the mean of its share of the values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    bars = min(width, len(finite))
    edges = [index * len(finite) // bars for index in range(bars + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(_BARS[min(int((mean - low) / span * len(_BARS)), len(_BARS) - 1) if span else 0] for mean in means)
