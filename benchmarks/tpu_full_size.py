"""Llama 3 at full size, compiled for the topologies its run files name: does each fit, and how long does the compiler take?

    python -m benchmarks.tpu_full_size [--only 70b-v5p] [--json benchmarks/results/tpu_full_size.json]

No TPU is needed.  Bound: every row fits its chip's memory; the 70B step compiles in 90 s on 2 processors that do nothing else.
"""

from __future__ import annotations

from typing import Any

from benchmarks._tpu import Row, run
from jaxllm.planning.tpu.study import Study

ROWS = (
    Row("8b-v5e", "llama3-8b.yaml", "v5e:8x8", ("parallel.fsdp=64",)),
    Row("8b-v6e", "llama3-8b.yaml", "v6e:4x4"),
    Row("70b-v5p", "llama3-70b.yaml", "v5p:4x4x8", reference={"compile_seconds": 90}),
    Row("405b-v5p", "llama3-405b.yaml", "v5p:8x8x16"),
)


def judge(_: Row, found: Study) -> dict[str, Any]:
    """Whether it fits, and the seconds it took: by the clock, and of the processor, on which other work tells less."""
    seconds = (found.trace_seconds or 0.0) + (found.compile_seconds or 0.0)
    return {"fits": found.fits, "seconds": seconds, "processor_seconds": found.processor_seconds}


if __name__ == "__main__":
    run(__doc__, ROWS, judge)
