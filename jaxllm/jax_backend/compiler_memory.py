"""What a compiler took from malloc goes back to the system once it is done.

XLA's compiler for CPUs leaves some 500 MiB in pieces that malloc keeps for itself, while the first step asks for memory of its
own: that sum, not a step, is then the peak of the process (benchmarks/LOG.md).
"""

from __future__ import annotations

from functools import cache

from jax import monitoring

from jaxllm.c_library import c_function

# JAX's name for having compiled a program, or having read it from the cache; it is recorded before the program first runs.
_COMPILED = "/jax/core/compile/backend_compile_duration"


@cache
def give_back_after_compiling() -> bool:
    """From now on, after every compilation of this process; whether this C library can (glibc).  Once is enough."""
    trim = c_function("malloc_trim")
    if trim is None:
        return False

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:  # noqa: ARG001
        if event == _COMPILED:
            trim(0)

    monitoring.register_event_duration_secs_listener(compiled)
    return True
