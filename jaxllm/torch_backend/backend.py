"""DeepSpeedBackend: the Backend protocol on PyTorch and DeepSpeed."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from jaxllm.backend import Decoder, EvaluationResult, Hyper, StepResult, Translator
from jaxllm.config.batch import BatchPlan, resolve_batch
from jaxllm.config.schema import BackendName
from jaxllm.data.batch import Batch, Shard
from jaxllm.errors import BackendError
from jaxllm.run import Run
from jaxllm.state.initial import check_shapes, initial_weights
from jaxllm.state.portable import read_state, write_state
from jaxllm.state.training_state import Progress, TensorReader, TrainingState
from jaxllm.torch_backend.combinations import check_combinations
from jaxllm.torch_backend.decoder import TorchDecoder
from jaxllm.torch_backend.engine import Engine, create_engine
from jaxllm.torch_backend.group import Group, join, with_peers
from jaxllm.torch_backend.host_memory import suit_memory
from jaxllm.torch_backend.liger import check_liger
from jaxllm.torch_backend.memory import MemoryMeter
from jaxllm.torch_backend.mesh import Mesh, make_mesh
from jaxllm.torch_backend.model import import_model
from jaxllm.torch_backend.step import Loop
from jaxllm.torch_backend.transfer import export_state, load_state
from jaxllm.torch_backend.translator import TorchTranslator


class DeepSpeedBackend:
    """Trains the Hugging Face model of the run's family under DeepSpeed; plain torch for fp64 and without training."""

    name: BackendName = "deepspeed"

    def __init__(self) -> None:
        self._group: Group = join()
        self._mesh = self._flat_mesh()
        self._run: Run | None = None
        self._engine: Engine | None = None
        self._loop: Loop | None = None
        self._memory: MemoryMeter | None = None
        self._step = 0
        self._source: TensorReader | None = None

    # ------------------------------------------------------------------------------------------------------ processes

    @property
    def shard(self) -> Shard:
        return self._mesh.shard

    @property
    def is_main(self) -> bool:
        return self._group.rank == 0

    @property
    def compile_seconds(self) -> float:
        return 0.0  # torch.compile, where it is asked for, compiles in the first step

    @with_peers()
    def any(self, flag: bool) -> bool:
        return self._group.any(flag)

    @with_peers()
    def barrier(self, name: str) -> None:  # noqa: ARG002 - torch's barriers have no names
        self._group.barrier()

    # ---------------------------------------------------------------------------------------------------------- running

    @with_peers()
    def start(self, run: Run, state: TrainingState | None, training: bool = True) -> None:
        config = run.config
        check_combinations(config, run.model, self._group.world)
        if training and config.deepspeed.liger:
            check_liger(self._group.device, config.training.precision)
        self._leave_mesh()
        self._mesh = make_mesh(self._group, config.parallel)
        untrained = BatchPlan(config.training.micro_batch or config.training.global_batch, 1)
        plan = resolve_batch(config, self._mesh.data) if training else untrained
        torch.set_float32_matmul_precision("highest")  # fp32 means fp32: no TF32
        params = initial_weights(run.model, run.config.seed) if state is None else state.params
        check_shapes(run.model, params)
        state = TrainingState(Progress(), params) if state is None else state
        self._run = run
        import_model(run.model)
        if self._group.device.type == "cpu":
            suit_memory(run.model, config.deepspeed.zero_stage, self._mesh.tensor)
        self._memory = MemoryMeter(self._group.device)
        self._engine = create_engine(run, self._mesh, plan, training)
        settings, chunk = config.deepspeed, config.training.loss_chunk
        self._loop = Loop(
            self._engine, self._mesh, plan, settings.attention, config.seed, run.model.spec, chunk, settings.torch_compile
        )
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

    @with_peers()
    def step(self, batch: Batch, hyper: Hyper) -> StepResult:
        assert self._loop is not None  # noqa: S101 - `start` comes first
        result = self._loop.step(batch, hyper, self._step)
        self._step += 1
        return result

    @with_peers()
    def evaluate(self, batches: Iterable[Batch], *, outputs: bool = False) -> EvaluationResult:
        assert self._loop is not None  # noqa: S101 - `start` comes first
        return self._loop.evaluate(batches, outputs=outputs)

    def decoder(self, max_length: int) -> Decoder:
        return TorchDecoder(self._started, self._group.device, max_length)

    def translator(self, beams: int, max_length: int) -> Translator:
        assert self._run is not None  # noqa: S101 - `start` comes first
        attention = self._run.config.deepspeed.attention
        return TorchTranslator(self._started, attention, self._group.device, beams, max_length)

    # ------------------------------------------------------------------------------------------------------------ state

    def export(self, progress: Progress) -> TrainingState:
        if self._source is not None:  # nothing was trained: the weights are what they were read from
            return TrainingState(progress, self._source)
        return export_state(self._started.store, progress)

    @with_peers()
    def save(self, folder: Path, progress: Progress) -> None:
        assert self._run is not None  # noqa: S101 - `start` comes first
        dtype = "float64" if self._run.config.training.precision == "fp64" else "float32"
        write_state(self.export(progress), folder, self._run.model.huggingface_config, dtype=dtype, is_writer=self.is_main)
        self._group.barrier()

    def wait(self) -> None:
        """`save` returns when everything is on disk."""

    @with_peers()
    def restore(self, folder: Path) -> None:
        assert self._run is not None  # noqa: S101 - `start` comes first
        state = read_state(folder)
        check_shapes(self._run.model, state.params)
        self._load(state)

    # ----------------------------------------------------------------------------------------------------- about itself

    def memory_bytes(self) -> int | None:
        """Peak of this process since `start`: see `jaxllm.torch_backend.memory`."""
        return None if self._memory is None else self._memory.peak()

    def device_description(self) -> dict[str, object]:
        cuda = self._group.device.type == "cuda"
        config = None if self._run is None else self._run.config
        return {
            "chip": torch.cuda.get_device_name(self._group.device) if cuda else platform.processor() or platform.machine(),
            "devices": self._group.world,
            "platform": "cuda" if cuda else "cpu",
            "processes": self._group.world,
            "zero_stage": None if config is None else config.deepspeed.zero_stage,
            "mesh": {"data": self._mesh.data, "context": self._mesh.context, "tensor": self._mesh.tensor},
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
        }

    @contextmanager
    def profile(self, folder: Path) -> Iterator[None]:
        """A context that writes a trace of what runs in it below `folder`, of this process."""
        from torch.profiler import profile, tensorboard_trace_handler

        with profile(on_trace_ready=tensorboard_trace_handler(str(folder), f"rank{self._group.rank}")):
            yield

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._loop = self._source = None
        self._leave_mesh()
        self._group.close()

    def _leave_mesh(self) -> None:
        self._mesh.close()
        self._mesh = self._flat_mesh()

    def _flat_mesh(self) -> Mesh:
        return Mesh(self._group, data=self._group.world)
