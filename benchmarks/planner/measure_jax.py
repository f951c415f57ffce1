"""Memory of a step by XLA's own analysis."""

from __future__ import annotations

from benchmarks.planner.cases import Case


def measure_mesh(case: Case) -> float:
    """Bytes of the step compiled for virtual CPU devices, in this process."""
    import jax

    jax.config.update("jax_num_cpu_devices", case.devices)
    jax.config.update("jax_enable_compilation_cache", False)
    from jaxllm.config import RunConfig
    from jaxllm.families import resolve_model, task_of
    from jaxllm.jax_backend.abstract import compile_step
    from jaxllm.jax_backend.assembly import assemble
    from jaxllm.jax_backend.mesh import create_mesh
    from jaxllm.run import Run

    config = RunConfig.model_validate(case.config())
    run = Run(config, resolve_model(config.model, task=task_of(config.objective)), 1)
    mesh = create_mesh(config)
    memory = compile_step(assemble(run, mesh), run, mesh).memory
    return float(memory["argument_size"] + memory["output_size"] - memory["alias_size"] + memory["temp_size"])


def measure_topology(case: Case) -> float:
    """Peak bytes of the step compiled for a TPU topology, in a process of its own."""
    from jaxllm.config import RunConfig
    from jaxllm.planning.tpu.compiler import compile_step
    from jaxllm.planning.tpu.topology import parse_topology

    compiled = compile_step(RunConfig.model_validate(case.config()), parse_topology(case.where), case.model["vocab_size"])
    if compiled.peak_bytes is None:
        raise RuntimeError(f"{case.name} does not fit and the compiler does not say how much it needs")
    return float(compiled.peak_bytes)
