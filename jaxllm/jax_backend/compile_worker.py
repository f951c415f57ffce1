"""A process that compiles one training step for a TPU topology and writes what it learnt as JSON.

    python -m jaxllm.jax_backend.compile_worker REQUEST.json ANSWER.json

A process of its own because XLA reads its flags once, and because a compiler that runs out of memory takes its process along.
The parent (`jaxllm.planning.tpu.compiler`) sets the environment: JAX on the CPU, libtpu without its queries for a real TPU, and
where the compiled program is to be dumped.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxllm.config import RunConfig, total_steps
from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.families import Vocabulary, check_sequence_length, resolve_model, task_of
from jaxllm.jax_backend.abstract import compile_step, topology_mesh
from jaxllm.jax_backend.assembly import assemble
from jaxllm.jax_backend.sharding import data_parallel
from jaxllm.run import Run

_NEEDED = re.compile(r"Used ([\d.]+)([KMGT]?) of|required for [\w ]+\(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main() -> None:
    """Read the request, compile, write the answer."""
    request, answer = Path(sys.argv[1]), Path(sys.argv[2])
    answer.write_text(json.dumps(respond(json.loads(request.read_text()))))


def respond(request: dict[str, Any]) -> dict[str, Any]:
    """The answer: `ok`, `too_large` (with the bytes needed, where the compiler says), or `refused` (a sentence)."""
    jax.config.update("jax_enable_compilation_cache", False)
    config = RunConfig.model_validate(request["config"])
    try:
        vocabulary = Vocabulary(request["vocab_size"])
        model = resolve_model(config.model, vocabulary, weights=False, task=task_of(config.objective))
        check_sequence_length(model, config)
        run = Run(config, model, total_steps(config))
        mesh = topology_mesh(run, request["topology"], request["slices"], request["options"])
        parts = assemble(run, mesh)
        compiled = compile_step(parts, run, mesh)
    except ConfigError as error:
        return {"status": "refused", "key": error.key, "message": error.message}
    except JaxllmError as error:
        return {"status": "refused", "key": "", "message": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"status": "too_large", "needed_bytes": _needed(str(error)), "message": str(error)[:4000]}
    return {
        "status": "ok",
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "coordinates": [_place(device) for device in mesh.devices.flat],
        "data_parallel": data_parallel(mesh),
        "memory": dict(compiled.memory),
        "trace_seconds": compiled.trace_seconds,
        "compile_seconds": compiled.compile_seconds,
        "processor_seconds": compiled.processor_seconds,
        "xla_flops": compiled.flops,
        "attention_blocks": _blocks(parts.network.runtime.attention),
        "parameter_shards": {
            path: [list(leaf.shape), list(parts.shardings[path].shard_shape(leaf.shape))]
            for path, leaf in parts.network.shapes.items()
        },
    }


def _blocks(kernel: Any) -> dict[str, Any] | None:
    """The block sizes of the splash kernel; None when attention is written out in XLA operations."""
    blocks = kernel.keywords.get("blocks") if isinstance(kernel, partial) else None
    return None if blocks is None else asdict(blocks)


def _place(device: Any) -> list[int]:
    """Slice, x, y, z and core of a device."""
    return [int(getattr(device, "slice_index", None) or 0), *(int(c) for c in device.coords), int(device.core_on_chip)]


def _needed(message: str) -> int | None:
    """Bytes the program would need on one device, from the compiler's message."""
    match = _NEEDED.search(message)
    if match is None:
        return None
    number, unit = next((n, u) for n, u in ((match[1], match[2]), (match[3], match[4])) if n)
    return int(float(number) * _UNITS[unit])


if __name__ == "__main__":
    main()
