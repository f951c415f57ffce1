"""DeepSpeedBackend: the Backend protocol on PyTorch and DeepSpeed."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

from jaxllm.backend import Decoder, EvaluationResult, Hyper, StepResult
from jaxllm.config.batch import BatchPlan, data_parallel, resolve_batch
from jaxllm.config.schema import BackendName, RunConfig
from jaxllm.data.batch import Batch, Shard
from jaxllm.errors import BackendError, ConfigError
from jaxllm.run import Run
from jaxllm.state.initial import check_shapes, initial_weights
from jaxllm.state.portable import read_state, write_state
from jaxllm.state.training_state import Progress, TensorReader, TrainingState
from jaxllm.torch_backend.decoder import TorchDecoder
from jaxllm.torch_backend.engine import Engine, create_engine
from jaxllm.torch_backend.group import Group, join
from jaxllm.torch_backend.step import Loop
from jaxllm.torch_backend.transfer import export_state, load_state


class DeepSpeedBackend:
    """Trains the Hugging Face model of the run's family under DeepSpeed; plain torch for fp64 and without training."""

    name: BackendName = "deepspeed"

    def __init__(self) -> None:
        self._group: Group = join()
        self._run: Run | None = None
        self._engine: Engine | None = None
        self._loop: Loop | None = None
        self._step = 0
        self._source: TensorReader | None = None

    # ------------------------------------------------------------------------------------------------------ processes

    @property
    def shard(self) -> Shard:
        return Shard(self._group.rank, self._group.world)

    @property
    def is_main(self) -> bool:
        return self._group.rank == 0

    def any(self, flag: bool) -> bool:
        return self._group.any(flag)

    def barrier(self, name: str) -> None:  # noqa: ARG002 - torch's barriers have no names
        self._group.barrier()

    # ---------------------------------------------------------------------------------------------------------- running

    def start(self, run: Run, state: TrainingState | None, training: bool = True) -> None:
        config = run.config
        check_parallel(config, self._group.world)
        plan = resolve_batch(config, self._group.world) if training else BatchPlan(config.training.micro_batch or 1, 1)
        torch.set_float32_matmul_precision("highest")  # fp32 means fp32: no TF32
        params = initial_weights(run.model, run.config.seed) if state is None else state.params
        check_shapes(run.model, params)
        state = TrainingState(Progress(), params) if state is None else state
        self._run = run
        self._engine = create_engine(run, self._group, plan, training)
        self._loop = Loop(self._engine, self._group, plan, config.deepspeed.attention, config.seed)
        self._load(state)
        self._source = None if training else state.params

    def _load(self, state: TrainingState) -> None:
        load_state(self._started.store, state)
        self._step = state.progress.step

    @property
    def _started(self) -> Engine:
        if self._engine is None:
            raise BackendError("the backend was used before `start`")
        return self._engine

    def step(self, batch: Batch, hyper: Hyper) -> StepResult:
        assert self._loop is not None  # noqa: S101 - `start` comes first
        result = self._loop.step(batch, hyper, self._step)
        self._step += 1
        return result

    def evaluate(self, batches: Iterable[Batch]) -> EvaluationResult:
        assert self._loop is not None  # noqa: S101 - `start` comes first
        return self._loop.evaluate(batches)

    def decoder(self, max_length: int) -> Decoder:
        return TorchDecoder(self._started, self._group.device, max_length)

    # ------------------------------------------------------------------------------------------------------------ state

    def export(self, progress: Progress) -> TrainingState:
        if self._source is not None:  # nothing was trained: the weights are what they were read from
            return TrainingState(progress, self._source)
        return export_state(self._started.store, progress)

    def save(self, folder: Path, progress: Progress) -> None:
        assert self._run is not None  # noqa: S101 - `start` comes first
        dtype = "float64" if self._run.config.training.precision == "fp64" else "float32"
        write_state(self.export(progress), folder, self._run.model.huggingface_config, dtype=dtype, is_writer=self.is_main)
        self._group.barrier()

    def wait(self) -> None:
        """`save` returns when everything is on disk."""

    def restore(self, folder: Path) -> None:
        assert self._run is not None  # noqa: S101 - `start` comes first
        state = read_state(folder)
        check_shapes(self._run.model, state.params)
        self._load(state)

    # ----------------------------------------------------------------------------------------------------- about itself

    def memory_bytes(self) -> int | None:
        if self._group.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._group.device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB

    def device_description(self) -> dict[str, object]:
        cuda = self._group.device.type == "cuda"
        config = None if self._run is None else self._run.config
        return {
            "chip": torch.cuda.get_device_name(self._group.device) if cuda else platform.processor() or platform.machine(),
            "devices": self._group.world,
            "platform": "cuda" if cuda else "cpu",
            "processes": self._group.world,
            "zero_stage": None if config is None else config.deepspeed.zero_stage,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
        }

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._loop = self._source = None
        self._group.close()


def check_parallel(config: RunConfig, world: int) -> None:
    """ConfigError unless `parallel` describes `world` processes in a way this backend runs."""
    parallel = config.parallel
    for axis in ("tensor", "context", "expert"):
        size = getattr(parallel, axis)
        if size > 1:
            raise ConfigError(
                f"parallel.{axis}", f"{size} is not possible: the deepspeed backend shards `data` and `fsdp` only; set it to 1"
            )
    if parallel.fsdp > 1 and config.deepspeed.zero_stage == 0:
        raise ConfigError(
            "deepspeed.zero_stage",
            f"fsdp {parallel.fsdp} shards optimiser state, which ZeRO stage 0 does not; set zero_stage to 1, 2 or 3",
        )
    wanted = data_parallel(parallel, world)
    if wanted != world:
        raise ConfigError(
            "parallel.data",
            f"data {parallel.data} x fsdp {parallel.fsdp} is a run of {wanted} processes, but {world} were started; "
            f"use --processes {wanted} or data -1",
        )
