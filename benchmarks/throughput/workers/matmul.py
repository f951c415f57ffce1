"""The physical limit: the fastest rate of large matrix products in a precision, by torch and by JAX.

Not a training contender: its answer is {"torch": FLOP/s, "jax": FLOP/s}.  Options: size.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.throughput.workers.protocol import read_request

REPEATS = 12


def fastest(product: Callable[[], object], size: int) -> float:
    """FLOP/s of the fastest of some products of two size x size matrices."""
    product()
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - begun)
    return 2.0 * size**3 / min(seconds)


def by_torch(size: int, precision: str, device: str) -> float:
    import torch

    torch.set_float32_matmul_precision("highest")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)

    def product() -> None:
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()

    return fastest(product, size)


def by_jax(size: int, precision: str) -> float:
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16 if precision == "bf16" else jnp.float32)
    exact = jax.lax.Precision.DEFAULT if precision == "bf16" else jax.lax.Precision.HIGHEST
    multiply = jax.jit(lambda x: jnp.dot(x, x, precision=exact))
    return fastest(lambda: multiply(a).block_until_ready(), size)


def main() -> None:
    request = read_request()
    size = request.options["size"]
    rates = {"torch": by_torch(size, request.precision, request.device), "jax": by_jax(size, request.precision)}
    Path(sys.argv[2]).write_text(json.dumps(rates))


if __name__ == "__main__":
    main()
