"""A bare loop around jaxllm's own jitted JAX step: what the backend and its feed cost beside it is the framework's tax."""

from __future__ import annotations

import jax
import numpy as np

from benchmarks.throughput.workers.jaxllm_backend import hyper_of, make_batch, make_run
from benchmarks.throughput.workers.protocol import Clock, read_request, write_answer
from jaxllm.jax_backend.assembly import assemble
from jaxllm.jax_backend.mesh import single_device_mesh
from jaxllm.jax_backend.optimizer import step_scalars
from jaxllm.jax_backend.process import configure_process
from jaxllm.jax_backend.step import DeviceBatch
from jaxllm.jax_backend.weights import load_params
from jaxllm.state.initial import initial_weights


def main() -> None:
    request = read_request()
    run = make_run(request)
    clock = Clock(request)
    configure_process(run.config)
    parts = assemble(run, single_device_mesh())
    master = parts.network.runtime.policy.master
    params = load_params(initial_weights(run.model, 0), run.model.rules, parts.storage.params, master)
    moments = jax.jit(parts.optimizer.init)(params)
    index = np.zeros((), np.uint32)
    for step, tokens in enumerate(clock.batches()):
        batch = make_batch(tokens)
        placed = jax.device_put({name: rows[None] for name, rows in batch.fields().items()})
        scalars = step_scalars(hyper_of(step), run.config.optimizer, master)
        params, moments, metrics = parts.train_step(params, moments, DeviceBatch(**placed), scalars, index)
        clock.done(metrics.loss)
    stats = jax.local_devices()[0].memory_stats() or {}
    write_answer(clock.answer(stats.get("peak_bytes_in_use") if request.device == "cuda" else None))


if __name__ == "__main__":
    main()
