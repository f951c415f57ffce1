"""The ladder: every level of every precision that is asked for, from the bottom up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxllm.config.schema import Precision
from jaxllm.errors import ConfigError
from jaxllm.parity.layouts import Layout, deepspeed_layouts, deepspeed_mesh_layouts, mesh_layouts, one_device
from jaxllm.parity.noise import noise, one_pass_noise
from jaxllm.parity.results import Measurement
from jaxllm.parity.runs import Runs, balances
from jaxllm.parity.subject import Subject
from jaxllm.parity.switch import Pair, backend_pairs, layout_pairs, switch
from jaxllm.parity.trajectory import trajectory


@dataclass(frozen=True)
class Extent:
    """How much is compared.

    precisions: in their order.  stages: ZeRO stages of the fp32 trajectories.  processes: of every DeepSpeed run of the
    trajectories.  full: also JAX meshes of eight virtual CPU devices, and switches that change mesh, processes and stage.
    """

    precisions: tuple[Precision, ...] = ("fp64", "fp32", "bf16")
    stages: tuple[int, ...] = (0, 1, 2, 3)
    processes: int = 1
    full: bool = False


def climb(subject: Subject, runs: Runs, extent: Extent) -> Iterator[Measurement]:
    """Everything that is compared, as soon as it is measured: fp64 first, which tells a mistake from rounding."""
    for precision in extent.precisions:
        if precision == "bf16":
            yield from one_pass_noise(subject)
            yield from noise(runs)
        else:
            yield from _one_step(subject, precision)
            yield from _many_steps(runs, precision, extent)


def check_fits(runs: Runs, extent: Extent) -> list[str]:
    """Before any run: ConfigError when DeepSpeed cannot run so many processes, and notes on what is changed or left out."""
    processes = Layout("deepspeed", "fp32", processes=extent.processes)
    if (reason := runs.misfit(processes)) is not None:
        raise ConfigError("training.global_batch", f"{reason}; change --processes or global_batch")
    training = runs.run.config.training
    notes = []
    if balances(runs.run.model) and training.micro_batch not in (None, training.global_batch):
        said = "the load-balancing loss is one number of a micro-batch, so that other micro-batches are another loss"
        notes.append(f"a step of every run is one micro-batch, not several of {training.micro_batch}: {said}")
    meshes = [*mesh_layouts("fp32"), *deepspeed_mesh_layouts("fp32")] if extent.full else []
    left_out = [f"{mesh.name} is left out: {reason}" for mesh in meshes if (reason := runs.misfit(mesh)) is not None]
    return notes + left_out


def _one_step(subject: Subject, precision: Precision) -> Iterator[Measurement]:
    """Levels 1 to 4, in this process."""
    from jaxllm.parity import levels
    from jaxllm.parity.referee import refereed

    run = subject.in_precision(precision)
    yield from levels.weights(run)
    one_pass = levels.OnePass.of_run(run, subject.data)
    yield from refereed(one_pass, lambda: levels.OnePass.of_run(subject.in_precision("fp64"), subject.data))
    yield from levels.optimizer(one_pass)


def _many_steps(runs: Runs, precision: Precision, extent: Extent) -> Iterator[Measurement]:
    """Levels 5 and 6, in processes of their own."""
    layouts = deepspeed_layouts(precision, extent.stages, extent.processes)
    pairs = backend_pairs(precision)
    if extent.full:
        meshes = (*mesh_layouts(precision), *deepspeed_mesh_layouts(precision))
        layouts += [mesh for mesh in meshes if runs.misfit(mesh) is None]
        pairs += [pair for pair in layout_pairs(precision) if all(runs.misfit(layout) is None for layout in pair)]
    yield from trajectory(runs, precision, layouts, keep=_needed_later(pairs, precision))
    yield from switch(runs, precision, pairs)


def _needed_later(pairs: list[Pair], precision: Precision) -> list[Layout]:
    """The layouts that switches begin in and, for bf16 to be measured against, one device of each backend."""
    return [*(first for first, _ in pairs), one_device("jax", precision), one_device("deepspeed", precision)]
