"""What the compiler took from malloc is given back before the program runs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Compiles a program of some size, and prints the MiB that malloc can still give back to the system.
_PROGRAM = """
import ctypes, os, sys
import jax, jax.numpy as jnp
from jaxllm.jax_backend.compiler_memory import give_back_after_compiling

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

def program(x):
    for number in range(60):
        x = jnp.sin(x @ x.T + number).cumsum(number % 2) / jnp.linalg.norm(x)
    return x.sum()

if sys.argv[1] == "give back":
    assert give_back_after_compiling() and give_back_after_compiling()
jax.jit(jax.grad(program)).lower(jnp.ones((16, 16))).compile()
before = resident()
ctypes.CDLL(None).malloc_trim(0)
print(before - resident())
"""


def _left(wanted: str) -> float:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = [sys.executable, "-c", _PROGRAM, wanted]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is of glibc")
def test_nothing_is_left_to_give_back() -> None:
    kept = _left("keep")
    assert kept > 20, "the program is too small to show anything"
    assert _left("give back") < kept / 4
