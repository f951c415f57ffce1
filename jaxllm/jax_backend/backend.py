"""JaxBackend: the Backend protocol on JAX, method for method as on the other side."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxllm.backend import Decoder, EvaluationResult, Hyper, StepResult, Translator
from jaxllm.config.batch import BatchPlan, resolve_batch
from jaxllm.data.batch import Batch, Shard
from jaxllm.errors import BackendError
from jaxllm.jax_backend import checkpoint, distributed
from jaxllm.jax_backend.abstract import compile_step
from jaxllm.jax_backend.assembly import assemble
from jaxllm.jax_backend.feed import BatchFeed
from jaxllm.jax_backend.mesh import create_mesh
from jaxllm.jax_backend.network import Network, Params
from jaxllm.jax_backend.offload import Storage
from jaxllm.jax_backend.optimizer import Moments, step_scalars
from jaxllm.jax_backend.padding import VocabularyFilling
from jaxllm.jax_backend.process import configure_process
from jaxllm.jax_backend.sharding import data_parallel
from jaxllm.jax_backend.step import EvaluationStep, TrainStep, build_evaluation_step
from jaxllm.jax_backend.weights import LiveWeights, load_params
from jaxllm.run import Run
from jaxllm.state import Progress, TrainingState
from jaxllm.state.initial import check_shapes, initial_weights


@dataclass
class _Started:
    """What `start` builds.  params and moments change with every step, the rest stays."""

    run: Run
    mesh: Mesh
    network: Network
    storage: Storage
    filling: VocabularyFilling
    feed: BatchFeed
    params: Params
    moments: Moments[jax.Array] | None
    train_step: TrainStep
    compile_seconds: float
    evaluation_steps: dict[bool, EvaluationStep]  # by whether they give outputs
    steps_taken: int
    flag: distributed.SharedFlag


class JaxBackend:
    """Training with `jax.jit` on a mesh of TPU, GPU or CPU devices."""

    name: Literal["jax"] = "jax"

    def __init__(self) -> None:
        self._state: _Started | None = None
        self._writer = checkpoint.AsyncWriter()

    @property
    def _started(self) -> _Started:
        if self._state is None:
            raise BackendError("the JAX backend has not been started; call start first")
        return self._state

    @property
    def shard(self) -> Shard:
        """The rows this process reads."""
        return self._started.feed.shard

    @property
    def is_main(self) -> bool:
        """Whether this is process 0."""
        return jax.process_index() == 0

    def start(self, run: Run, state: TrainingState | None, training: bool = True) -> None:
        """Join the other processes, make the mesh, build the model and fill it from `state` (or initialise it)."""
        config = run.config
        configure_process(config)
        mesh = create_mesh(config)
        plan: BatchPlan = resolve_batch(config, data_parallel(mesh))
        parts = assemble(run, mesh)
        rules, storage = run.model.rules, parts.storage
        master = parts.network.runtime.policy.master
        # Before there are weights: what the compiler takes and what they take then never stand beside each other.
        compile_seconds = compile_step(parts, run, mesh).seconds if training else 0.0
        source = state.params if state is not None else initial_weights(run.model, config.seed)
        check_shapes(run.model, source)
        params = load_params(source, rules, storage.params, master)
        moments: Moments[jax.Array] | None = None
        if training and state is not None and state.exp_avg is not None and state.exp_avg_sq is not None:
            exp_avg = load_params(state.exp_avg, rules, storage.moments, master)
            moments = Moments(exp_avg, load_params(state.exp_avg_sq, rules, storage.moments, master))
        elif training:
            moments = jax.jit(parts.optimizer.init, out_shardings=Moments(storage.moments, storage.moments))(params)
        self._state = _Started(
            run=run,
            mesh=mesh,
            network=parts.network,
            storage=storage,
            filling=VocabularyFilling(rules, mesh, storage),
            feed=BatchFeed(mesh, plan),
            params=params,
            moments=moments,
            train_step=parts.train_step,
            compile_seconds=compile_seconds,
            evaluation_steps={wanted: build_evaluation_step(parts.network, outputs=wanted) for wanted in (False, True)},
            steps_taken=state.progress.step if state is not None else 0,
            flag=distributed.SharedFlag(mesh),
        )

    @property
    def compile_seconds(self) -> float:
        """What `start` spent on compiling the step, or on reading it from the compilation cache."""
        return self._started.compile_seconds

    def step(self, batch: Batch, hyper: Hyper) -> StepResult:
        """One optimiser step on this process's rows of the global batch; returns before the devices have finished."""
        started = self._started
        if started.moments is None:
            raise BackendError("the JAX backend was started without an optimiser; start it with training=True to step")
        scalars = step_scalars(hyper, started.run.config.optimizer, started.network.runtime.policy.master)
        index = np.asarray(started.steps_taken, np.uint32)
        started.params, started.moments, metrics = started.train_step(
            started.params, started.moments, started.feed(batch), scalars, index
        )
        started.steps_taken += 1
        return StepResult(metrics.loss, metrics.gradient_norm, metrics.target_tokens, metrics.statistics)

    def evaluate(self, batches: Iterable[Batch], *, outputs: bool = False) -> EvaluationResult:
        """Loss over batches, without dropout; the host waits for the devices once, at the end."""
        started = self._started
        step = started.evaluation_steps[outputs]
        values = jax.device_get([step(started.params, started.feed(batch)) for batch in batches])
        found = [started.feed.in_order(part) for _, _, part in values if part is not None]
        return EvaluationResult(
            loss_sum=float(sum(float(loss) for loss, _, _ in values)),
            target_tokens=float(sum(float(tokens) for _, tokens, _ in values)),
            outputs=np.concatenate(found) if found else None,
        )

    def decoder(self, max_length: int) -> Decoder:
        """A decoder over the current weights, valid until the next step."""
        from jaxllm.jax_backend.decoder import JaxDecoder

        started = self._started
        return JaxDecoder(started.run.model.spec, started.network.runtime, started.params, max_length)

    def translator(self, beams: int, max_length: int) -> Translator:
        """A translator over the current weights, valid until the next step."""
        from jaxllm.jax_backend.translator import JaxTranslator

        started = self._started
        return JaxTranslator(started.run.model.spec, started.network.runtime, started.params, beams, max_length)

    def export(self, progress: Progress) -> TrainingState:
        """The current state, streamed leaf by leaf (collective); valid until the next step."""
        started = self._started
        rules, mesh = started.run.model.rules, started.mesh
        params = LiveWeights(started.params, rules, mesh)
        if started.moments is None:
            return TrainingState(progress, params)
        first, second = started.moments
        return TrainingState(progress, params, LiveWeights(first, rules, mesh), LiveWeights(second, rules, mesh))

    def save(self, folder: Path, progress: Progress) -> None:
        """Write weights and moments below `folder`, in the background once they are in host memory."""
        self._writer.save(folder, self._started.filling.remove(self._trees()), progress)

    def wait(self) -> None:
        """Return when the last `save` is wholly on disk; raises what it failed with."""
        self._writer.wait()

    def restore(self, folder: Path) -> None:
        """Fill weights and moments from what `save` wrote, on any mesh and process count."""
        started = self._started
        progress = checkpoint.read_progress(folder)
        names = list(self._trees())
        shapes = started.filling.shapes(started.network.shapes)
        checkpoint.check(folder, names, {path: leaf.shape for path, leaf in shapes.items()})
        # The old arrays go first: two copies of the state need not fit.
        for leaf in jax.tree.leaves((started.params, started.moments)):
            leaf.delete()
        trees = started.filling.add(checkpoint.restore(folder, names, started.filling.shardings, shapes))
        started.params = trees["params"]
        if started.moments is not None:
            started.moments = Moments(trees["exp_avg"], trees["exp_avg_sq"])
        started.steps_taken = progress.step

    def _trees(self) -> dict[str, Params]:
        started = self._started
        moments = {} if started.moments is None else started.moments._asdict()
        return {"params": started.params, **moments}

    def any(self, flag: bool) -> bool:
        """Whether `flag` was true on any process: at this call, or, with several processes, at the one before (collective)."""
        return flag if jax.process_count() == 1 else self._started.flag(flag)

    def barrier(self, name: str) -> None:
        """Return when every process has called this (collective)."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(name)

    def memory_bytes(self) -> int | None:
        """Peak memory of the busiest local device, or of the process on CPU."""
        if jax.default_backend() == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
        known = [int(peak) for peak in peaks if peak is not None]
        return max(known) if known else None

    def device_description(self) -> dict[str, object]:
        """Devices, mesh and library versions."""
        from importlib.metadata import version

        mesh = self._started.mesh
        packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
        device = mesh.devices.flat[0]
        return {
            "chip": device.device_kind,
            "platform": device.platform,
            "devices": int(mesh.size),
            "processes": jax.process_count(),
            "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
            "versions": {name: version(name) for name in packages},
        }

    @contextmanager
    def profile(self, folder: Path) -> Iterator[None]:
        """A context that writes a trace of what runs in it below `folder`, of this process."""
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            yield

    def close(self) -> None:
        """Finish writing, free the devices and leave the other processes."""
        distributed.blame(sys.exception())
        try:
            self._writer.wait()
        finally:
            self._state = None
            distributed.leave()
