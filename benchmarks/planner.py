"""What `jaxllm plan` predicts against what is measured: memory under JAX and DeepSpeed, and FLOPs.

    python -m benchmarks.planner [--only cpu|tpu|deepspeed|flops] [--case NAME] [--kept FOLDER] [--json OUT]

* JAX on CPU meshes and on TPU topologies (with libtpu installed): the real step, compiled for shapes alone, against XLA's
  `memory_analysis`: on TPU its peak, on CPU arguments + temporaries, since XLA:CPU reports no peak.
* DeepSpeed: a real run of four steps in one or two processes over gloo: the tensors that are alive between two steps, and the
  highest rise of allocations within the next one, by torch's profiler.  Frees on gloo's threads go unreported, so that the step
  counts in which that distorts the sum least.  The gradient bucket, a constant of the DeepSpeed config, is taken off both
  sides: it cannot hide an error.
* FLOPs of a forward and a backward pass of one layer and the rest of the model, against XLA's `cost_analysis`.

Each case runs in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks._report import write

BOUND, FLOPS_BOUND = 0.10, 0.02

_LLAMA = {"family": "llama", "max_position_embeddings": 8192}
LLAMA_SMALL = {
    **_LLAMA,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 6016,
}
LLAMA_100M = {
    **_LLAMA,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
}
LLAMA_1B = {
    **_LLAMA,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_7B = {
    **_LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
LLAMA_8B = {**LLAMA_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
LLAMA_70B = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = {"family": "gpt2", "vocab_size": 50304, **_NO_DROPOUT}
GPT2_SMALL = {**GPT2, "n_embd": 512, "n_layer": 6, "n_head": 8, "vocab_size": 8192}
GPT2_XL = {**GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25}
LLAMA_TINY = {
    **_LLAMA,
    "hidden_size": 320,
    "intermediate_size": 700,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "vocab_size": 1000,
}
LLAMA_WIDE = {
    **_LLAMA,
    "hidden_size": 512,
    "intermediate_size": 1344,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
}
LARGE_VOCABULARY = {**LLAMA_SMALL, "vocab_size": 48000}
QWEN3 = {**LLAMA_SMALL, "family": "qwen3", "head_dim": 64}
GPT2_TINY = {**GPT2, "n_embd": 320, "n_layer": 3, "n_head": 5, "vocab_size": 1000, "n_positions": 512}


@dataclass(frozen=True)
class Case:
    """One measurement.  where: `cpu:N` devices, a TPU topology, or `deepspeed:N` processes."""

    name: str
    where: str
    model: dict[str, Any]
    sequence: int
    batch: int
    micro: int
    parallel: dict[str, int] = field(default_factory=dict)
    precision: str = "bf16"
    jax: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    loss_chunk: int | str = "auto"

    @property
    def devices(self) -> int:
        """Devices or processes."""
        sizes = 1
        for size in self.parallel.values():
            sizes *= size
        return sizes

    def config(self) -> dict[str, Any]:
        """The run file."""
        return {
            "name": "planner",
            "model": self.model,
            "data": {
                "tokenizer": {"train": "bpe", "vocab_size": self.model["vocab_size"]},
                "sequence_length": self.sequence,
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": {
                "steps": 1,
                "global_batch": self.batch,
                "micro_batch": self.micro,
                "precision": self.precision,
                "loss_chunk": self.loss_chunk,
            },
            "parallel": {"data": 1, **self.parallel},
            "jax": {**self.jax, "cpu_devices": self.devices} if self.where.startswith("cpu") else self.jax,
            "deepspeed": self.deepspeed,
        }


def _cpu(name: str, model: dict[str, Any], sequence: int, batch: int, micro: int, remat: str, **parallel: int) -> Case:
    devices = Case("", "", model, 0, 0, 0, parallel).devices
    return Case(name, f"cpu:{devices}", model, sequence, batch, micro, parallel, "fp32", {"remat": remat, "attention": "xla"})


def _tpu(
    name: str, where: str, model: dict[str, Any], sequence: int, batch: int, micro: int, remat: str, **parallel: int
) -> Case:
    return Case(name, where, model, sequence, batch, micro, parallel, "bf16", {"remat": remat})


def _ds(
    name: str, model: dict[str, Any], sequence: int, batch: int, micro: int, precision: str, stage: int, world: int, **more: Any
) -> Case:
    parallel = {"fsdp": world} if stage else {"data": world}
    return Case(
        name, f"deepspeed:{world}", model, sequence, batch, micro, parallel, precision, {}, {"zero_stage": stage, **more}
    )


CPU = (
    _cpu("llama, full", LLAMA_SMALL, 384, 4, 4, "full"),
    _cpu("llama, none", LLAMA_SMALL, 384, 4, 4, "none"),
    _cpu("llama, dots", LLAMA_SMALL, 384, 4, 4, "dots"),
    _cpu("llama, 2 micro-batches", LLAMA_SMALL, 384, 8, 4, "full"),
    _cpu("llama 100M, fsdp 8", LLAMA_100M, 512, 8, 1, "full", fsdp=8),
    _cpu("llama 100M, fsdp 4 x tensor 2", LLAMA_100M, 512, 8, 2, "full", fsdp=4, tensor=2),
    _cpu("llama 100M, tensor 4", LLAMA_100M, 512, 2, 2, "none", tensor=4),
    _cpu("llama 100M, data 2 x fsdp 2 x tensor 2", LLAMA_100M, 256, 8, 2, "none", data=2, fsdp=2, tensor=2),
    _cpu("gpt2, none", GPT2_SMALL, 512, 4, 4, "none"),
    _cpu("gpt2, data 4, dots", GPT2_SMALL, 512, 8, 2, "dots", data=4),
    _cpu("gpt2, full", GPT2_SMALL, 1024, 2, 2, "full"),
    _cpu("gpt2, fsdp 4, full", GPT2_SMALL, 512, 8, 2, "full", fsdp=4),
    _cpu("llama, tied, none", {**LLAMA_SMALL, "tie_word_embeddings": True}, 256, 4, 4, "none"),
    _cpu("llama, fsdp 2 x tensor 2, dots", LLAMA_SMALL, 384, 8, 4, "dots", fsdp=2, tensor=2),
    _cpu("llama 100M, fsdp 2, dots", LLAMA_100M, 512, 4, 2, "dots", fsdp=2),
    _cpu("llama 100M, data 8, none", LLAMA_100M, 256, 8, 1, "none", data=8),
    _cpu("llama 100M, tensor 2, full", LLAMA_100M, 512, 2, 2, "full", tensor=2),
    _cpu("qwen3, fsdp 4, full", QWEN3, 384, 8, 2, "full", fsdp=4),
)
CPU = (
    *CPU,
    replace(_cpu("llama, loss in chunks", LARGE_VOCABULARY, 384, 4, 4, "full"), loss_chunk=256),
    replace(
        _cpu("llama, loss in chunks, fsdp 2 x tensor 2", LARGE_VOCABULARY, 384, 8, 4, "full", fsdp=2, tensor=2), loss_chunk=256
    ),
)
TPU = (
    _tpu("1B, fsdp 8, full", "v5e:2x4", LLAMA_1B, 2048, 8, 1, "full", fsdp=8),
    _tpu("1B, fsdp 8, dots", "v5e:2x4", LLAMA_1B, 2048, 8, 1, "dots", fsdp=8),
    _tpu("1B, fsdp 8, none", "v5e:2x4", LLAMA_1B, 1024, 8, 1, "none", fsdp=8),
    _tpu("8B, fsdp 16, full", "v6e:4x4", LLAMA_8B, 2048, 16, 1, "full", fsdp=16),
    _tpu("gpt2, data 4, none", "v5e:2x2", GPT2, 1024, 16, 4, "none", data=4),
    _tpu("1B, fsdp 4 x tensor 4", "v5e:4x4", LLAMA_1B, 2048, 16, 4, "full", fsdp=4, tensor=4),
    _tpu("1B, 4 micro-batches", "v5e:2x4", LLAMA_1B, 2048, 32, 1, "full", fsdp=8),
    _tpu("70B, fsdp 32 x tensor 4", "v5p:4x4x8", LLAMA_70B, 2048, 32, 1, "full", fsdp=32, tensor=4),
    _tpu("8B, fsdp 8, dots", "v5p:2x2x2", LLAMA_8B, 2048, 8, 1, "dots", fsdp=8),
    _tpu("gpt2 xl, fsdp 8", "v4:2x2x2", GPT2_XL, 1024, 16, 2, "full", fsdp=8),
    _tpu("8B, fsdp 8", "tpu7x:2x2x1", LLAMA_8B, 2048, 8, 1, "full", fsdp=8),
    _tpu("8B, fsdp 16, sequence 4,096", "v6e:4x4", LLAMA_8B, 4096, 16, 1, "full", fsdp=16),
)
DEEPSPEED = (
    _ds("llama, stage 0", LLAMA_TINY, 448, 4, 4, "fp32", 0, 1),
    _ds("llama, stage 0, bf16", LLAMA_TINY, 448, 4, 4, "bf16", 0, 1),
    _ds("llama, eager attention", LLAMA_TINY, 448, 4, 4, "bf16", 0, 1, attention="eager"),
    _ds("llama, activation checkpointing", LLAMA_TINY, 448, 4, 4, "fp32", 0, 1, activation_checkpointing=True),
    _ds("gpt2, stage 0", GPT2_TINY, 448, 4, 4, "fp32", 0, 1),
    _ds("llama, stage 1", LLAMA_WIDE, 512, 2, 1, "fp32", 1, 2),
    _ds("llama, stage 2", LLAMA_WIDE, 512, 2, 1, "fp32", 2, 2),
    _ds("llama, stage 3", LLAMA_WIDE, 512, 2, 1, "fp32", 3, 2),
    _ds("llama, stage 1, bf16", LLAMA_WIDE, 512, 2, 1, "bf16", 1, 2),
    _ds("llama, stage 2, bf16", LLAMA_WIDE, 512, 4, 1, "bf16", 2, 2),
    _ds("llama, stage 3, bf16", LLAMA_WIDE, 512, 4, 1, "bf16", 3, 2),
    _ds("gpt2, stage 2, bf16", GPT2_TINY, 448, 4, 2, "bf16", 2, 2),
    replace(_ds("llama, loss in chunks", {**LLAMA_TINY, "vocab_size": 16000}, 448, 4, 4, "fp32", 0, 1), loss_chunk=128),
    replace(_ds("llama, loss in chunks, bf16", {**LLAMA_TINY, "vocab_size": 16000}, 448, 4, 4, "bf16", 0, 1), loss_chunk=128),
)


# ---------------------------------------------------------------------------------------------------------------- predicted


def predicted(case: Case) -> tuple[float, float]:
    """Bytes that the planner expects at the peak, and the constant that is taken off both sides."""
    from jaxllm.config import RunConfig
    from jaxllm.families import resolve_model
    from jaxllm.planning.deepspeed_memory import bucket_bytes, deepspeed_memory
    from jaxllm.planning.jax_memory import jax_memory
    from jaxllm.planning.search import torch_attention
    from jaxllm.planning.setting import setting_of

    config = RunConfig.model_validate(case.config())
    model = resolve_model(config.model)
    if case.where.startswith("deepspeed"):
        setting = setting_of(config, "deepspeed", case.devices, torch_attention(config, model))
        constant = bucket_bytes(setting)
        return deepspeed_memory(model, setting, cuda=False).peak - constant, constant
    cpu = case.where.startswith("cpu")
    setting = setting_of(config, "jax", case.devices, "xla" if cpu else "splash")
    return jax_memory(model, setting, "cpu" if cpu else "tpu").peak, 0.0


# ----------------------------------------------------------------------------------------------------------------- measured


def measure_cpu_mesh(case: Case) -> dict[str, float]:
    """XLA's own analysis of the step compiled for virtual CPU devices, in this process."""
    import jax

    jax.config.update("jax_num_cpu_devices", case.devices)
    jax.config.update("jax_enable_compilation_cache", False)
    from jaxllm.config import RunConfig
    from jaxllm.families import resolve_model
    from jaxllm.jax_backend.abstract import compile_step
    from jaxllm.jax_backend.assembly import assemble
    from jaxllm.jax_backend.mesh import create_mesh
    from jaxllm.run import Run

    config = RunConfig.model_validate(case.config())
    run = Run(config, resolve_model(config.model), 1)
    mesh = create_mesh(config)
    memory = compile_step(assemble(run, mesh), run, mesh).memory
    return {"peak": float(memory["argument_size"] + memory["output_size"] - memory["alias_size"] + memory["temp_size"])}


def measure_topology(case: Case) -> dict[str, float]:
    """XLA's own analysis of the step compiled for a TPU topology."""
    from jaxllm.config import RunConfig
    from jaxllm.planning.tpu.compiler import compile_step
    from jaxllm.planning.tpu.topology import parse_topology

    compiled = compile_step(RunConfig.model_validate(case.config()), parse_topology(case.where), case.model["vocab_size"])
    if compiled.peak_bytes is None:
        raise RuntimeError(f"{case.name} does not fit and the compiler does not say how much it needs")
    return {"peak": float(compiled.peak_bytes)}


def measure_deepspeed_here(case: Case) -> dict[str, float]:
    """Peak of live allocations over some steps of this process, one of the case's."""
    import numpy as np
    from torch.profiler import ProfilerActivity, profile

    from jaxllm.backend import Hyper
    from jaxllm.config import RunConfig
    from jaxllm.data.batch import Batch
    from jaxllm.families import resolve_model
    from jaxllm.run import Run
    from jaxllm.torch_backend import DeepSpeedBackend

    config = RunConfig.model_validate(case.config())
    run = Run(config, resolve_model(config.model), 1)
    backend = DeepSpeedBackend()
    rows = case.batch // case.devices
    tokens = np.random.default_rng(backend.shard.index).integers(0, case.model["vocab_size"], (rows, case.sequence + 1))
    ones = np.ones((rows, case.sequence), np.int32)
    positions = np.broadcast_to(np.arange(case.sequence, dtype=np.int32), ones.shape).copy()
    inputs, targets = (tokens[:, part].astype(np.int32) for part in (slice(0, -1), slice(1, None)))
    batch = Batch(inputs, targets, ones.astype(np.float32), positions, ones)
    backend.start(run, None)
    measured = []
    for step in range(4):
        before = _resident()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            backend.step(batch, Hyper(1e-3, 1.0 - 0.9 ** (step + 1), 1.0 - 0.95 ** (step + 1)))
        rises = list(_rises(found))
        measured.append((abs(rises[-1] - (_resident() - before)), before + max(rises)))
    # The step of which the fewest frees went unreported: what it is thought to leave differs least from what is really there.
    return {"peak": float(min(measured[1:])[1])}


def _resident() -> int:
    """Bytes of all tensors that are alive, storages that they share counted once."""
    import torch

    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _rises(found: Any) -> Iterator[int]:
    """Bytes more than at the beginning, after each allocation and free that the profiler has seen."""

    def visit(nodes: Any) -> Iterator[tuple[int, int, int]]:
        for node in nodes:
            if node.tag.name == "Allocation":
                yield node.start_time_ns, node.typed[1].alloc_size, node.typed[1].ptr
            yield from visit(node.children)

    alive: dict[int, int] = {}
    total = 0
    events = sorted(visit(found.profiler.kineto_results.experimental_event_tree()), key=lambda event: event[0])
    for _, size, address in events:
        if size > 0:
            total += size - alive.get(address, 0)  # an address that is handed out again was freed, unreported
            alive[address] = size
        else:
            total -= alive.pop(address, -size)
        yield total


def measure_deepspeed(case: Case) -> dict[str, float]:
    """The peak of the case's first process."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    workers = []
    for rank in range(case.devices):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.devices, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {**os.environ, **{key: str(value) for key, value in group.items()}, "OMP_NUM_THREADS": "1"}
        workers.append(_start(case, {**environment, "JAX_PLATFORMS": "cpu"}))
    found = [_finish(worker) for worker in workers]
    return found[0]


# --------------------------------------------------------------------------------------------------------------- processes


def _start(case: Case, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.planner", "--worker", case.where, "--case", case.name]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(worker: subprocess.Popen[str]) -> dict[str, float]:
    output, errors = worker.communicate()
    marked = [line for line in output.splitlines() if line.startswith("@@")]
    if not marked:
        raise RuntimeError(errors[-2000:])
    found: dict[str, float] = json.loads(marked[0][2:])
    return found


def measure(case: Case) -> dict[str, float]:
    """The case measured, in processes of its own."""
    if case.where.startswith("deepspeed"):
        return measure_deepspeed(case)
    if case.where.startswith("cpu"):
        return _finish(_start(case, {**os.environ, "JAX_PLATFORMS": "cpu"}))
    return measure_topology(case)


def compare_kept(folder: Path) -> dict[str, Any]:
    """The same for what `jaxllm compile --keep` has left: the largest models take the compiler many minutes."""
    from jaxllm.config import RunConfig
    from jaxllm.families import Vocabulary, resolve_model
    from jaxllm.planning.jax_memory import jax_memory
    from jaxllm.planning.setting import setting_of

    request, answer = (json.loads((folder / name).read_text()) for name in ("request.json", "answer.json"))
    config = RunConfig.model_validate_json(json.dumps(request["config"]))
    model = resolve_model(config.model, Vocabulary(request["vocab_size"]))
    setting = setting_of(config, "jax", math.prod(answer["mesh"].values()), "splash")
    name = f"{config.name}, {setting.mesh}, micro-batch {setting.micro_batch} x {setting.sequence}, {setting.remat}"
    return _line(name, request["topology"], jax_memory(model, setting).peak, answer["memory"]["peak_memory"])


def compare(case: Case) -> dict[str, Any]:
    """One line of the table."""
    expected, constant = predicted(case)
    found = measure(case)["peak"] - constant
    return _line(case.name, case.where, expected, found)


def _line(name: str, where: str, expected: float, found: float) -> dict[str, Any]:
    error = round(expected / found - 1, 4)
    return {"name": name, "where": where, "predicted": round(expected), "measured": round(found), "error": error}


# --------------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("cpu", "tpu", "deepspeed", "flops"), action="append")
    parser.add_argument("--case")
    parser.add_argument(
        "--kept", type=Path, action="append", default=[], help="A folder that `jaxllm compile --keep` has left."
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        case = next(each for each in (*CPU, *TPU, *DEEPSPEED) if (each.name, each.where) == (arguments.case, arguments.worker))
        found = measure_deepspeed_here(case) if case.where.startswith("deepspeed") else measure_cpu_mesh(case)
        print("@@" + json.dumps(found), flush=True)
        os._exit(0)  # without the frameworks' long farewell
    results: dict[str, Any] = {}
    for kind, cases in (("cpu", CPU), ("tpu", TPU), ("deepspeed", DEEPSPEED)):
        if arguments.only and kind not in arguments.only:
            continue
        results[kind] = []
        for case in cases:
            if arguments.case in (None, case.name):
                line = compare(case)
                results[kind].append(line)
                print(_said(line), flush=True)
        for folder in arguments.kept if kind == "tpu" else ():
            results[kind].append(compare_kept(folder))
            print(_said(results[kind][-1]), flush=True)
        errors = [abs(line["error"]) for line in results[kind]]
        if errors:
            print(f"{kind}: {len(errors)} cases, largest error {max(errors):.1%} (bound {BOUND:.0%})", flush=True)
    if not arguments.only or "flops" in arguments.only:
        from benchmarks.planner_flops import compare_flops

        results["flops"] = compare_flops()
        for line in results["flops"]:
            print(f"{line['name']:44} {line['measured']:.5g} FLOPs, predicted {line['predicted']:.5g} ({line['error']:+.2%})")
    write(arguments.json, results)


def _said(line: dict[str, Any]) -> str:
    sizes = f"measured {line['measured'] / 2**20:10.1f} MiB, predicted {line['predicted'] / 2**20:10.1f} MiB"
    return f"{line['where']:12} {line['name']:40} {sizes} ({line['error']:+.1%})"


if __name__ == "__main__":
    main()
