"""One case predicted and measured."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

from benchmarks.planner.cases import Case
from benchmarks.planner.measure_deepspeed import measure_process
from benchmarks.planner.measure_jax import measure_mesh, measure_topology

_ANSWER = "@@"


def compare(case: Case) -> dict[str, Any]:
    """One line of the table."""
    return line(case, measure(case))


def line(case: Case, measured: float) -> dict[str, Any]:
    """The same of what was measured already."""
    expected = predicted(case)
    error = round(expected / measured - 1, 4)
    return {"name": case.name, "where": case.where, "predicted": round(expected), "measured": round(measured), "error": error}


def predicted(case: Case) -> float:
    """Bytes that the planner expects at the peak."""
    from jaxllm.config import RunConfig
    from jaxllm.families import resolve_model, task_of
    from jaxllm.planning.deepspeed_memory import deepspeed_memory
    from jaxllm.planning.jax_memory import jax_memory
    from jaxllm.planning.search import torch_attention, tpu_attention
    from jaxllm.planning.setting import setting_of

    config = RunConfig.model_validate(case.config())
    model = resolve_model(config.model, task=task_of(config.objective))
    if case.kind == "deepspeed":
        setting = setting_of(config, "deepspeed", case.devices, torch_attention(config, model))
        return deepspeed_memory(model, setting, cuda=False).peak
    attention = "xla" if case.kind == "cpu" else tpu_attention(config, model)
    return jax_memory(model, setting_of(config, "jax", case.devices, attention), "cpu" if case.kind == "cpu" else "tpu").peak


def measure(case: Case) -> float:
    """Bytes of the case, measured in processes of its own."""
    if case.kind == "tpu":
        return measure_topology(case)
    if case.kind == "cpu":
        return _finish(_start(case, {**os.environ, "JAX_PLATFORMS": "cpu"}))
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


def work(case: Case) -> None:
    """What a process of a case does, to its end."""
    found = measure_process(case) if case.kind == "deepspeed" else measure_mesh(case)
    print(_ANSWER + json.dumps(found), flush=True)
    os._exit(0)  # without the frameworks' long farewell


def _start(case: Case, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.planner", "--worker", case.where, "--case", case.name]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(worker: subprocess.Popen[str]) -> float:
    output, errors = worker.communicate()
    marked = [line for line in output.splitlines() if line.startswith(_ANSWER)]
    if not marked:
        raise RuntimeError(errors[-2000:])
    return float(json.loads(marked[0][len(_ANSWER) :]))
