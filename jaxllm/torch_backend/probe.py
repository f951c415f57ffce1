"""TorchProbe: the transformers model laid open for comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from jaxllm.backend import Hyper
from jaxllm.config.batch import BatchPlan
from jaxllm.config.schema import BackendName
from jaxllm.data.batch import Batch
from jaxllm.errors import BackendError
from jaxllm.families import ModulePoint, module_points
from jaxllm.probe import Array, Choices, Pass
from jaxllm.run import Run
from jaxllm.state.initial import check_shapes
from jaxllm.state.training_state import TensorReader
from jaxllm.torch_backend.capture import capture as capture_points
from jaxllm.torch_backend.choices import Recorded
from jaxllm.torch_backend.choices import choices as record_choices
from jaxllm.torch_backend.engine import PlainEngine
from jaxllm.torch_backend.group import alone
from jaxllm.torch_backend.mesh import single
from jaxllm.torch_backend.model import mode
from jaxllm.torch_backend.step import Loop
from jaxllm.torch_backend.transfer import Store, load_params

_LOGITS = {"logits": ModulePoint("")}  # what the whole model returns


class TorchProbe:
    """A `jaxllm.probe.Probe` of the unmodified transformers model, in one process and without a process group.

    Every precision runs on `PlainEngine`: fp64 is the true float64 reference; bf16 is a bf16 model whose gradients are summed
    up in fp32 and whose fp32 masters are updated.  Model, micro-batches, loss, clipping and AdamW are the code that the
    backend trains with at ZeRO stage 0; only the DeepSpeed engine around them is left out, which there changes no bit.
    """

    name: BackendName = "deepspeed"

    def __init__(self) -> None:
        self._mesh = single(alone())
        self._loaded: tuple[Run, PlainEngine] | None = None

    @property
    def _model(self) -> tuple[Run, PlainEngine]:
        if self._loaded is None:
            raise BackendError("the probe was used before `load`")
        return self._loaded

    def load(self, run: Run, params: TensorReader) -> None:
        """Build the model of `run` in its precision and fill it with `params`.  CheckpointError when they do not fit."""
        check_shapes(run.model, params)
        self._loaded = None  # frees the model before the next one is made
        torch.set_float32_matmul_precision("highest")  # fp32 means fp32: no TF32
        engine = PlainEngine(run, self._mesh, training=True)
        load_params(engine.store, params)
        self._loaded = run, engine

    def passes(self, batch: Batch, *, capture: bool = False, choices: Mapping[str, Choices] | None = None) -> Pass:
        """Forward and backward over all rows; gradients and cotangents are those of the mean loss over target tokens.

        choices: what the routers choose instead of what they would; the pass has what they would.  Where
        the run's loss is in chunks of tokens, the logits are of a forward pass of their own.
        """
        run, engine = self._model
        loop = self._loop(batch)
        if not capture and loop.chunk_of(min(loop.plan.micro_batch, batch.rows) * batch.sequence_length):
            with record_choices(run.model, engine.model, choices):
                logits = loop.evaluate([batch], outputs=True).outputs
            assert logits is not None  # noqa: S101 - asked for
            with record_choices(run.model, engine.model, choices) as chosen:
                loss = self._accumulate(batch)
            decided = _choices(chosen, batch.rows)
            return Pass(loss=loss, logits=logits, gradients=_arrays(engine.take_gradients()), choices=decided)
        points = {**module_points(run.model), **_LOGITS} if capture else _LOGITS
        with (
            record_choices(run.model, engine.model, choices) as chosen,
            capture_points(engine.model, points, gradients=capture) as recording,
        ):
            loss = self._accumulate(batch, whole=capture)
        values = _by_row(recording.values(), batch.rows)
        return Pass(
            loss=loss,
            logits=values["logits"],
            gradients=_arrays(engine.take_gradients()),
            values=values if capture else {},
            cotangents=_by_row(recording.cotangents(), batch.rows) if capture else {},
            choices=_choices(chosen, batch.rows),
        )

    def after_step(self, batch: Batch, hyper: Hyper) -> Mapping[str, Array]:
        """The masters after one update, whose bias corrections are those of a first update."""
        _, engine = self._model
        engine.store.begin_load(updates=0)
        with _kept(engine.store):
            self._accumulate(batch)
            engine.update(hyper.learning_rate)
            stepped = _arrays({name: engine.store.gather(name, "params") for name in engine.store.names()})
        engine.close()  # frees the moments
        return stepped

    def _accumulate(self, batch: Batch, *, whole: bool = False) -> float:
        """The loss of a batch, its gradients left in the engine.  whole: in one micro-batch."""
        with mode(self._model[1].model, training=False):
            loss, _ = self._loop(batch, whole=whole).accumulate(batch, step=0)
        return float(loss)

    def _loop(self, batch: Batch, *, whole: bool = False) -> Loop:
        """whole: in one micro-batch, whose logits all exist."""
        run, engine = self._model
        config = run.config
        rows = batch.rows if whole else config.training.micro_batch or batch.rows
        plan = BatchPlan(rows, -(-batch.rows // rows))
        chunk = "none" if whole else config.training.loss_chunk
        return Loop(engine, self._mesh, plan, config.deepspeed.attention, config.seed, run.model.spec, chunk)


@contextmanager
def _kept(store: Store) -> Iterator[None]:
    """Whatever becomes of the parameters within, afterwards they are as before, to the last bit."""
    before = {name: store.gather(name, "params").clone() for name in store.names()}
    try:
        yield
    finally:
        for name, values in before.items():
            store.gather(name, "params").copy_(values)
        store.publish()


def _choices(recorded: Recorded, rows: int) -> dict[str, Choices]:
    """By point, of the rows of a batch."""
    logits = _by_row({point: recorded.logits(point) for point in recorded.points()}, rows)
    chosen = {point: recorded.chosen(point).cpu().numpy() for point in recorded.points()}
    return {point: Choices(x, chosen[point].reshape(*x.shape[:2], -1)) for point, x in logits.items()}


def _by_row(tensors: Mapping[str, torch.Tensor], rows: int) -> dict[str, Array]:
    """(B, T, ...), where modules compute with (B T, ...): routers, and with T = 1 outputs for whole rows."""
    return {name: _array(x.reshape(rows, -1, x.shape[-1]) if x.ndim == 2 else x) for name, x in tensors.items()}


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """Copies on the host, in fp32, or in fp64 where they are that already."""
    return {name: _array(tensor) for name, tensor in tensors.items()}


def _array(tensor: torch.Tensor) -> Array:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    values: Array = tensor.detach().to("cpu", dtype, copy=True).contiguous().numpy()
    return values
