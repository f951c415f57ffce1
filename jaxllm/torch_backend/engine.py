"""What runs the model and updates it: a DeepSpeed engine, or plain torch for float64, probes and where nothing is trained.

Both are driven by the same micro-batch loop (`jaxllm.torch_backend.step`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch.nn import Parameter

from jaxllm.config.batch import BatchPlan
from jaxllm.families import ModelSpec, flatten
from jaxllm.run import Run
from jaxllm.torch_backend.chunked_loss import Tokens, attach_loss_head
from jaxllm.torch_backend.deepspeed_config import deepspeed_config
from jaxllm.torch_backend.document_attention import attend_by_documents, kernel_of, plain_attention
from jaxllm.torch_backend.documents import goes_by_documents
from jaxllm.torch_backend.float64 import true_float64
from jaxllm.torch_backend.libraries import import_deepspeed
from jaxllm.torch_backend.liger import apply_liger
from jaxllm.torch_backend.masters import MasterWeights
from jaxllm.torch_backend.mesh import Mesh
from jaxllm.torch_backend.model import ModelInputs, build_model
from jaxllm.torch_backend.optimizer import RATE, ClippedAdamW, adamw, freeze, parameter_groups
from jaxllm.torch_backend.tensor_parallel import ShardedStore, Split, split_model
from jaxllm.torch_backend.transfer import FragmentStore, PartitionStore, ReplicatedStore, Store
from jaxllm.torch_backend.ulysses import share_sequences

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class Engine(Protocol):
    """A model that can be run, differentiated and updated."""

    dtype: torch.dtype

    @property
    def model(self) -> Any:
        """The module to call: it takes the Hugging Face model's arguments."""
        ...

    @property
    def store(self) -> Store:
        """Masters and moments."""
        ...

    def numerics(self) -> AbstractContextManager[None]:
        """The context in which the model and the loss are computed."""
        ...

    def whole_sequences(self) -> AbstractContextManager[None]:
        """The context in which the model takes whole sequences, though processes share them in training."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of replicas * loss to what is accumulated; the update takes the mean over replicas."""
        ...

    def update(self, learning_rate: float) -> torch.Tensor:
        """Clip and apply the accumulated gradient, unless its global norm is NaN or infinite.  Returns that norm."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def forward(engine: Engine, inputs: ModelInputs) -> torch.Tensor:
    """Logits (B, S, V), or outputs (B, 1, L) for a whole row, in the engine's dtype."""
    logits: torch.Tensor = engine.model(**inputs.arguments).logits
    return logits if logits.ndim == 3 else logits[:, None]


def chunked_loss(engine: Engine, inputs: ModelInputs, tokens: Tokens) -> torch.Tensor:
    """The sum of this process's losses without the logits of all tokens at once: see `jaxllm.torch_backend.chunked_loss`."""
    with engine.model.loss_head.losses_of(tokens):
        loss: torch.Tensor = engine.model(**inputs.arguments).logits
    # DeepSpeed divides the gradient of what a model puts out by the number of micro-batches: the loss has to be another tensor.
    return loss.clone()


def create_engine(run: Run, mesh: Mesh, plan: BatchPlan, training: bool) -> Engine:
    """The engine a run asks for, its weights not yet filled."""
    if training and run.config.training.precision != "fp64":
        return DeepSpeedEngine(run, mesh, plan)
    return PlainEngine(run, mesh, training)


def _divide(model: Any, spec: ModelSpec, mesh: Mesh) -> dict[str, Split]:
    """Let processes share the model's sequences and tensors as the mesh says; how each divided tensor is cut, by name."""
    if mesh.context > 1:
        share_sequences(model, mesh)
    elif goes_by_documents(spec, kernel_of(model), longest=1):
        attend_by_documents(model)
    return split_model(model, mesh) if mesh.tensor > 1 else {}


def _prepare(model: Any, run: Run, *, training: bool = True) -> None:
    """Options of the model that hold at every stage."""
    attach_loss_head(model, run.model.spec, compiled=run.config.deepspeed.torch_compile)
    if training and run.config.deepspeed.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})


def _parameters(run: Run, named: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The parameters in checkpoint order."""
    return {name: named[name] for name, _, _ in flatten(run.model.rules)}


class PlainEngine:
    """torch without DeepSpeed: float64 training, and probes, evaluation or generation in any precision.

    It trains as a DeepSpeed engine does at stage 0, with fp32 masters over a bf16 model.
    """

    def __init__(self, run: Run, mesh: Mesh, training: bool) -> None:
        config = run.config
        self.dtype = _DTYPES[config.training.precision]
        self._mesh = mesh
        with self.numerics():
            self._model = build_model(run.model, config.deepspeed.attention, self.dtype, mesh.group.device)
        splits = _divide(self._model, run.model.spec, mesh)
        freeze(dict(self._model.named_parameters()), run.model, config.optimizer)
        self._masters = MasterWeights(self._model) if training and self.dtype == torch.bfloat16 else None
        named = dict(self._model.named_parameters()) if self._masters is None else self._masters.named_masters()
        self._parameters = _parameters(run, named)
        groups = parameter_groups(self._parameters, run.model, config.optimizer)
        self._optimizer = ClippedAdamW(groups, config.optimizer, mesh, [self._parameters[name] for name in splits])
        store = ReplicatedStore(self._parameters, self._optimizer, self._masters)
        self._store: Store = ShardedStore(store, splits, mesh) if splits else store
        _prepare(self._model, run, training=training)

    @property
    def model(self) -> Any:
        return self._model

    @property
    def store(self) -> Store:
        return self._store

    def numerics(self) -> AbstractContextManager[None]:
        return true_float64() if self.dtype == torch.float64 else nullcontext()

    def whole_sequences(self) -> AbstractContextManager[None]:
        return plain_attention(self._model)

    def backward(self, loss: torch.Tensor) -> None:
        with self.numerics():  # activation checkpointing runs the model again in here
            loss.backward()  # type: ignore[no-untyped-call]

    def update(self, learning_rate: float) -> torch.Tensor:
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                self._mesh.sum(parameter.grad).mul_(1.0 / self._mesh.replicas)
        _set_learning_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._store.publish()
        return self._optimizer._global_grad_norm  # noqa: SLF001 - the name DeepSpeed reads it by

    def take_gradients(self) -> dict[str, torch.Tensor]:
        """What `backward` has accumulated, by Hugging Face name and in the masters' dtype; nothing is left accumulated."""
        taken = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self._parameters.items()
        }
        self._optimizer.zero_grad(set_to_none=True)
        return taken

    def close(self) -> None:
        self._optimizer.state.clear()


class DeepSpeedEngine:
    """A DeepSpeed engine at ZeRO stage 0 to 3, in fp32 or bf16, always over fp32 masters."""

    dtype: torch.dtype

    def __init__(self, run: Run, mesh: Mesh, plan: BatchPlan) -> None:
        deepspeed = import_deepspeed()
        config = run.config
        self.dtype = _DTYPES[config.training.precision]
        self._stage = config.deepspeed.zero_stage
        settings = deepspeed_config(run, plan, mesh)
        with self._partitioned(deepspeed, settings, mesh):
            model = build_model(run.model, config.deepspeed.attention, self.dtype, mesh.group.device)
        if config.deepspeed.liger:
            apply_liger(run.model, model)
        splits = _divide(model, run.model.spec, mesh)
        _prepare(model, run)
        freeze(dict(model.named_parameters()), run.model, config.optimizer)
        self._network = model
        self._masters = MasterWeights(model) if self._stage == 0 and self.dtype == torch.bfloat16 else None
        named = dict(model.named_parameters()) if self._masters is None else self._masters.named_masters()
        self._parameters = _parameters(run, named)
        groups = parameter_groups(self._parameters, run.model, config.optimizer)
        sharded = [self._parameters[name] for name in splits]
        optimizer = (
            ClippedAdamW(groups, config.optimizer, mesh, sharded) if self._stage == 0 else adamw(groups, config.optimizer)
        )
        trained = model if self._masters is None else self._masters
        trained.ds_autotp_parsed = True  # `_divide` has done it
        with warnings.catch_warnings():
            # It imports parts of itself and of torch only now, which are deprecated by other parts of torch.
            warnings.simplefilter("ignore", DeprecationWarning)
            initialized = deepspeed.initialize(model=trained, optimizer=optimizer, config=settings, dist_init_required=False)
        self._engine = initialized[0]
        if self._stage == 0 and mesh.replicas == 1:
            # Alone, it would copy all gradients into one tensor, add nothing to them and copy them back.
            self._engine.enable_backward_allreduce = False
        if config.deepspeed.torch_compile:
            (self._engine if self._masters is None else model).compile()
        store = self._make_store(mesh)
        self._store: Store = ShardedStore(store, splits, mesh) if splits else store

    @contextmanager
    def _partitioned(self, deepspeed: Any, settings: dict[str, Any], mesh: Mesh) -> Iterator[None]:
        """At stage 3 each weight is cut into parts as soon as it is made, so that no process ever holds the whole model."""
        if self._stage < 3:
            yield
            return
        # transformers imports this with its models; inside zero.Init, which replaces tensor constructors, it fails to import.
        import torch._dynamo  # noqa: F401
        from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride

        # By default every new tensor is also cast to the parameters' dtype, which would round the rotary frequencies to bf16.
        only_device = [DeepSpeedTensorOverride.device]
        group = mesh.replica_group
        with deepspeed.zero.Init(data_parallel_group=group, config_dict_or_path=settings, tensor_overrides=only_device):
            yield

    def _make_store(self, mesh: Mesh) -> Store:
        optimizer = self._engine.optimizer
        if self._stage == 0:
            return ReplicatedStore(self._parameters, optimizer, self._masters)
        if self._stage == 3:
            return PartitionStore(self._parameters, optimizer, mesh.replica_index)
        # Stage 1 in bf16 is another class of DeepSpeed's, with another name for the same buffers.
        names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        flat = next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))
        return FragmentStore(self._parameters, optimizer, flat)

    @property
    def model(self) -> Any:
        return self._engine

    @property
    def store(self) -> Store:
        return self._store

    def numerics(self) -> AbstractContextManager[None]:
        return nullcontext()

    def whole_sequences(self) -> AbstractContextManager[None]:
        return plain_attention(self._network)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro-batch

    def update(self, learning_rate: float) -> torch.Tensor:
        optimizer = self._engine.optimizer
        _set_learning_rate(optimizer, learning_rate)
        self._engine.step()
        if self._masters is not None:
            self._masters.publish()
        # A skipped step leaves the norm of the step before in place (stage 3) or marks it as infinite.
        if optimizer.overflow:
            return torch.tensor(float("inf"))
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def close(self) -> None:
        self._engine.destroy()


def _set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group[RATE]
