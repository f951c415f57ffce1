"""Compiling a run's step for a topology in a process of its own, and reading what comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxllm.config import RunConfig
from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.huge_pages import with_huge_pages
from jaxllm.planning.tpu.hlo import parse
from jaxllm.planning.tpu.memory import MemoryDivision, divide, peak_bytes
from jaxllm.planning.tpu.topology import Topology

PIP_LINE = "pip install 'jaxllm[tpu]'"


@dataclass(frozen=True)
class CompiledStep:
    """What a compile gave.  answer: the worker's.  program: text of the program after code generation; None if too large."""

    answer: Mapping[str, Any]
    program: str | None
    memory: MemoryDivision | None
    wall_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the compiler found room for it."""
        return bool(self.answer["status"] == "ok")

    @property
    def peak_bytes(self) -> int | None:
        """Peak HBM of one device; for a program that is too large what the compiler says it needs, if it does."""
        if self.memory is not None:
            return self.memory.total
        needed = self.answer.get("needed_bytes")
        return None if needed is None else int(needed)


def require_libtpu() -> None:
    """JaxllmError with the line that installs it when libtpu, which holds the TPU compiler, is missing."""
    if find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise JaxllmError(f"the TPU compiler (libtpu) is not installed; install it with: {PIP_LINE}")


def compile_step(
    config: RunConfig, topology: Topology, vocab_size: int | None, *, keep: Path | None = None, flags: Sequence[str] = ()
) -> CompiledStep:
    """Compile the training step of `config` for `topology`.

    keep: a folder for everything the compiler writes.  flags: of libtpu, beside those of its generation.  ConfigError for what
    the run file says and cannot be; JaxllmError when the compiler fails otherwise.
    """
    require_libtpu()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="jaxllm-compile-") as scratch:
        folder = keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        answer = _ask(config, topology, vocab_size, folder, flags)
        wall = time.perf_counter() - started
        if answer["status"] == "refused":
            raise ConfigError(answer["key"], answer["message"]) if answer["key"] else JaxllmError(answer["message"])
        if answer["status"] != "ok":
            return CompiledStep(answer, None, None, wall)
        assignment = _dumped(folder, "after_optimizations-buffer-assignment.txt")
        memory = divide(
            parse(_dumped(folder, "after_optimizations_after_buffer_assignment.txt")),
            assignment,
            _dumped(folder, "after_optimizations-live-range.txt"),
            answer["parameter_shards"],
            peak_bytes(assignment, answer["memory"]),
        )
        return CompiledStep(answer, _dumped(folder, "after_codegen.txt"), memory, wall)


def _ask(config: RunConfig, topology: Topology, vocab_size: int | None, folder: Path, flags: Sequence[str]) -> dict[str, Any]:
    request, answer = folder / "request.json", folder / "answer.json"
    generation = topology.generation
    options = dict(generation.options)
    if topology.host != (2, 2, 1):
        options["chips_per_host_bounds"] = list(topology.host)
    asked = {
        "config": config.model_dump(mode="json", by_alias=True),
        "vocab_size": vocab_size,
        "topology": topology.name,
        "slices": topology.slices,
        "options": options,
    }
    request.write_text(json.dumps(asked))
    command = [sys.executable, "-m", "jaxllm.jax_backend.compile_worker", str(request), str(answer)]
    done = subprocess.run(
        command, env=worker_environment(folder, flags), capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0 or not answer.exists():
        raise JaxllmError(f"the compiler for {topology} failed: {_last_words(done)}")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def worker_environment(folder: Path, flags: Sequence[str]) -> dict[str, str]:
    """For a worker: JAX on the CPU, libtpu not looking for a TPU, malloc in huge pages, the program dumped into `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "XLA_", "JAX_", "LIBTPU_"))}
    library = os.environ.get("TPU_LIBRARY_PATH")
    return {
        **(with_huge_pages(kept) or kept),
        **({"TPU_LIBRARY_PATH": library} if library else {}),
        "JAX_PLATFORMS": "cpu",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # silences a warning; the topology says what to compile for
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilers at once do no harm: none of them takes a TPU
        "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text",
        "LIBTPU_INIT_ARGS": " ".join(flags),
    }


def _dumped(folder: Path, ending: str) -> str:
    """The compiler's file of the training step."""
    found = sorted(folder.glob(f"*jit_step*.{ending}"), key=lambda file: file.stat().st_size)
    if not found:
        raise JaxllmError(f"the compiler wrote no {ending}; is this libtpu newer than jaxllm knows?")
    return found[-1].read_text(errors="replace")


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        return f"it was ended by signal {-done.returncode}, perhaps for want of memory on this machine"
    return lines[-1][:400] if lines else f"it ended with status {done.returncode}"
