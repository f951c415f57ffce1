"""Peak memory of this process: on a GPU what torch's allocator held at most, on a CPU what the run added to the process.

A process on a CPU holds much that no planner counts: the interpreter, torch, the tokenised data.  So what is resident when the
model is about to be built is taken as the beginning, the kernel's high-water mark is set back to it (Linux), and what is
reported is how far above it the mark has risen since.  Memory that the C library keeps after tensors were freed counts as
well; MALLOC_MMAP_THRESHOLD_=65536 and MALLOC_TRIM_THRESHOLD_=65536 in the environment let it go, for a measurement.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_HIGH_WATER_MARK = "5"


class MemoryMeter:
    """Measures from when it is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._beginning = 0
            return
        self._beginning = psutil.Process().memory_info().rss
        try:
            _CLEAR.write_text(_RESET_HIGH_WATER_MARK)
        except OSError:  # not Linux, or not allowed: the mark of the process's whole life is all there is
            self._marks = False
        else:
            self._marks = True

    def peak(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return max(0, (_high_water_mark() if self._marks else _lifetime_peak()) - self._beginning)


def _high_water_mark() -> int:
    """Peak resident bytes since the mark was set back."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _lifetime_peak() -> int:
    """Peak resident bytes since the process began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
