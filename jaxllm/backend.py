"""The Backend protocol, and the one place that turns a name into a backend.

A backend owns the weights, the optimiser and the devices; it knows nothing of files, schedules or logging.  The order of
calls is: `start`, then `step` / `evaluate` / `save` / `export` in any order, then `close`.  In a run of several processes
every process makes the same calls in the same order.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from jaxllm.config.schema import BackendName, RunConfig
from jaxllm.data.batch import Batch, Shard
from jaxllm.errors import BackendError
from jaxllm.families import Model
from jaxllm.run import Run
from jaxllm.state.training_state import Progress, TrainingState

if TYPE_CHECKING:
    from jaxllm.jax_backend.distributed import Rendezvous
    from jaxllm.probe import Probe


@dataclass(frozen=True)
class Hyper:
    """Scalars of one step, computed once on the host in double precision and handed to both backends.

    learning_rate: of this step.  bias_correction1, bias_correction2: 1 - beta**update (Kingma & Ba, arXiv:1412.6980).
    """

    learning_rate: float
    bias_correction1: float
    bias_correction2: float


@dataclass(frozen=True)
class StepResult:
    """What a step reports, over the GLOBAL batch.  Values may still be on a device: `float()` waits for them.

    loss: sum of weighted token losses / sum of weights.  gradient_norm: global norm before clipping.  target_tokens: sum of
    weights.  statistics: more to report, by name (`jaxllm.metrics.routing`).  The update was left out, and the state is as
    before, when loss or gradient_norm is not finite.
    """

    loss: SupportsFloat
    gradient_norm: SupportsFloat
    target_tokens: SupportsFloat
    statistics: Mapping[str, SupportsFloat] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationResult:
    """Sums over all rows of all processes: loss_sum in nats, target_tokens the sum of weights.

    outputs_NTL: of the model for every row of every global batch, in order, on every process; None unless asked for.
    """

    loss_sum: float
    target_tokens: float
    outputs: NDArray[np.floating] | None = None


class Decoder(Protocol):
    """Next-token logits of one sequence, with a key/value cache.  V vocabulary entries."""

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits (V,) after the prompt, which starts the sequence anew; at least one token."""
        ...

    def decode(self, token: int) -> NDArray[np.float32]:
        """Logits (V,) after one more token."""
        ...


class Translator(Protocol):
    """Next-token logits of the targets of many sources, with a cache of keys and values.

    B sources of R tokens, K beams of each, N = B K targets (those of a source one after another), V vocabulary entries.
    """

    def start(self, source_BR: NDArray[np.int32], segments_BR: NDArray[np.int32], token: int) -> NDArray[np.float32]:
        """Logits (B, V) after `token`, the first of every target.  segments: 0 for padding."""
        ...

    def advance(self, tokens_N: NDArray[np.int32], parents_N: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits (N, V) after one more token of every target.

        parents: the target of the same source that each goes on from, so that a search can drop some and double others.
        """
        ...


class Backend(Protocol):
    """One way to train: the same methods, the same meaning, on JAX and on PyTorch + DeepSpeed."""

    @property
    def name(self) -> BackendName:
        """The name that `backend` in the run file chooses it by."""
        ...

    @property
    def shard(self) -> Shard:
        """The rows this process reads."""
        ...

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the person."""
        ...

    def start(self, run: Run, state: TrainingState | None, training: bool = True) -> None:
        """Join the other processes, lay out the devices, build the model, and fill it from `state` (or initialise it).

        Without `state` the weights come from `run.model.pretrained` if that is a folder, else from the initialiser.  With
        `training` false only what `evaluate`, `export` and `decoder` need is built: no optimiser state.
        """
        ...

    @property
    def compile_seconds(self) -> float:
        """What `start` spent on compiling the step; 0 where the first step compiles what it needs."""
        ...

    def step(self, batch: Batch, hyper: Hyper) -> StepResult:
        """One optimiser step on this process's rows of the global batch."""
        ...

    def evaluate(self, batches: Iterable[Batch], *, outputs: bool = False) -> EvaluationResult:
        """Loss over batches, without dropout; every process passes its own rows of the same batches.

        outputs: also gather the model's outputs: of a classification, since those of a language model are too many.
        """
        ...

    def decoder(self, max_length: int) -> Decoder:
        """A decoder over the current weights for sequences of up to max_length tokens (collective: all feed the same)."""
        ...

    def translator(self, beams: int, max_length: int) -> Translator:
        """A translator over the current weights of an encoder-decoder, for targets of up to max_length tokens (collective)."""
        ...

    def export(self, progress: Progress) -> TrainingState:
        """The current state, streamed leaf by leaf (collective)."""
        ...

    def save(self, folder: Path, progress: Progress) -> None:
        """Write weights and moments below `folder` (which exists), possibly still writing when this returns; see `wait`."""
        ...

    def wait(self) -> None:
        """Return when the last `save` is wholly on disk; raises what it failed with."""
        ...

    def restore(self, folder: Path) -> None:
        """Fill weights and moments from what `save` of the same backend wrote, on any mesh, process count or ZeRO stage."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any process (collective): how a signal on one process stops all.

        With several processes the answer may be that of the call before, so that nobody waits for the devices.
        """
        ...

    def barrier(self, name: str) -> None:
        """Return when every process has called this (collective)."""
        ...

    def memory_bytes(self) -> int | None:
        """Peak memory of the busiest local device (the process on CPU), or None where it is unknown."""
        ...

    def device_description(self) -> dict[str, object]:
        """Devices, mesh and library versions, for environment.json; `chip` and `devices` name the accelerator and count."""
        ...

    def profile(self, folder: Path) -> AbstractContextManager[None]:
        """A context that writes a trace of what runs in it below `folder`, for TensorBoard's profile plugin and Perfetto."""
        ...

    def close(self) -> None:
        """Leave the other processes and free the devices."""
        ...


def create_backend(name: BackendName) -> Backend:
    """The backend of that name, importing only its own framework.  BackendError when it is not installed."""
    if name == "jax":
        from jaxllm.jax_backend import JaxBackend

        return JaxBackend()
    require_deepspeed()
    from jaxllm.torch_backend import DeepSpeedBackend

    return DeepSpeedBackend()


def create_probe(name: BackendName) -> Probe:
    """The probe of that backend, importing only its own framework.  BackendError when it is not installed."""
    if name == "jax":
        from jaxllm.jax_backend.probe import JaxProbe

        return JaxProbe()
    require_deepspeed()
    from jaxllm.torch_backend.probe import TorchProbe

    return TorchProbe()


def check_layout(config: RunConfig, model: Model, devices: int | None) -> None:
    """ConfigError when the backend of the run file cannot combine what it asks for, as far as is known without devices.

    devices: how many there will be; None: as many as the mesh needs.
    """
    if config.backend == "deepspeed":
        from jaxllm.torch_backend.combinations import check_combinations

        check_combinations(config, model, devices)
    else:
        from jaxllm.jax_backend.combinations import check_combinations as check_jax

        check_jax(config, model)


def wanted_processes(config: RunConfig, processes: int | None) -> int:
    """How many processes a run wants on this machine.  processes: `--processes`, or None.

    JAX drives every local device from one process.  DeepSpeed has one process per device: as many as the mesh names, or, with
    `parallel.data: -1`, as there are GPUs (one on a CPU).
    """
    if processes is not None or config.backend == "jax":
        return processes or 1
    require_deepspeed()
    from jaxllm.torch_backend.launch import local_devices

    mesh = config.parallel
    others = mesh.fsdp * mesh.tensor * mesh.context * mesh.expert
    return max(others, local_devices()) if mesh.data == -1 else mesh.data * others


def in_group(name: BackendName) -> bool:
    """Whether another process (ours, torchrun, the deepspeed launcher, SLURM) started this one as a member of a group."""
    if name == "jax":
        from jaxllm.jax_backend.distributed import Rendezvous

        return Rendezvous.from_environment() is not None
    from jaxllm.torch_backend.rendezvous import in_group as in_torch_group

    return in_torch_group()


def outer_group(name: BackendName, coordinator: str | None, index: int | None, count: int | None) -> Rendezvous | None:
    """This process's place in a run that SLURM, MPI, a TPU pod or a person starts on several hosts; None: it is alone.

    The arguments are those of the command line.  Only for JAX: what DeepSpeed's launchers start is a worker already.
    """
    if name == "jax":
        from jaxllm.jax_backend.clusters import outer_rendezvous

        return outer_rendezvous(coordinator, index, count)
    if (coordinator, index, count) != (None, None, None):
        raise BackendError("--coordinator is for --backend jax; start DeepSpeed on several hosts with torchrun or deepspeed")
    return None


def launch_member(arguments: list[str], place: Rendezvous) -> int:
    """Run `jaxllm ARGUMENTS` as the member of a JAX run at that place; its exit status."""
    from jaxllm.jax_backend.launch import launch_one

    return launch_one(arguments, place)


def launch(name: BackendName, arguments: list[str], processes: int) -> int:
    """Run `jaxllm ARGUMENTS` in so many processes on this machine; the exit status of the group."""
    if name == "jax":
        from jaxllm.jax_backend.launch import launch as launch_jax

        return launch_jax(arguments, processes)
    require_deepspeed()
    from jaxllm.torch_backend.launch import launch as launch_torch

    return launch_torch(arguments, processes)


def require_deepspeed(what: str = "--backend deepspeed") -> None:
    """BackendError when a package that `what` needs is not installed."""
    for package in ("torch", "deepspeed"):
        if importlib.util.find_spec(package) is None:
            raise BackendError(f"{what} needs the package {package!r}; install it with: pip install 'jaxllm[deepspeed]'")
