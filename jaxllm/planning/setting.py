"""A setting: everything beside the model that decides how much memory one device needs and how fast it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from jaxllm.backend import check_layout
from jaxllm.config import RunConfig, resolve_batch
from jaxllm.config.batch import data_parallel
from jaxllm.config.loss_chunk import LossChunk, chunk_tokens
from jaxllm.config.remat import RematPolicy
from jaxllm.config.schema import BackendName, ParallelConfig, Precision
from jaxllm.errors import ConfigError
from jaxllm.families import Model, flax_leaves
from jaxllm.families.spec import ModelSpec
from jaxllm.families.weights import WeightRule
from jaxllm.jax_backend.cuts import shard_shape, stored_shape
from jaxllm.planning.tpu.changes import changed

Remat = RematPolicy | tuple[str, ...]

BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp64": 8}
"""Bytes of an element in the compute dtype."""


@dataclass(frozen=True)
class Setting:
    """One way to run a model on some devices.

    parallel: with every size known.  sequence: tokens of a sequence.  remat: as `jax.remat`; on DeepSpeed `full` is activation
    checkpointing.  attention: `xla`, `splash`, `cudnn`, `ring`; `sdpa`, `eager`.  offload_optimizer: as the backend's key of
    that name; offload_param: weights in the host's memory.  loss_chunk: as `training.loss_chunk`.  target: tokens of the target
    of an encoder-decoder, whose source has `sequence` of them; None without an encoder.
    """

    backend: BackendName
    parallel: ParallelConfig
    sequence: int
    global_batch: int
    micro_batch: int
    precision: Precision
    remat: Remat
    attention: str
    zero_stage: int = 0
    offload_optimizer: str = "none"
    offload_param: bool = False
    loss_chunk: LossChunk = "none"
    target: int | None = None

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        parallel = self.parallel
        return parallel.data * parallel.fsdp * parallel.tensor * parallel.context * parallel.expert

    @property
    def groups(self) -> int:
        """Groups of devices that see different rows."""
        return self.parallel.data * self.parallel.fsdp * self.parallel.expert

    @property
    def accumulation(self) -> int:
        """Forward passes of an optimiser step."""
        return self.global_batch // (self.groups * self.micro_batch)

    @property
    def tokens(self) -> int:
        """Tokens that one device holds in a forward pass; of an encoder-decoder, those of its decoder."""
        return self.micro_batch * (self.target or self.sequence) // self.parallel.context

    @property
    def source_tokens(self) -> int:
        """Tokens that one device's encoder holds in a forward pass; 0 without one."""
        return 0 if self.target is None else self.micro_batch * self.sequence

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimiser step over all devices."""
        return self.global_batch * (self.sequence + (self.target or 0))

    def chunk(self, spec: ModelSpec, *, tpu: bool = False) -> int | None:
        """Tokens whose logits exist at once on a device; None: all of them.  tpu: whether it is one."""
        if spec.head.kind not in ("causal-lm", "masked-lm"):
            return None
        if self.backend == "deepspeed":  # AutoTP gathers the logits of a head that is not tied
            is_whole = self.parallel.tensor == 1 or spec.tie_embeddings
            return chunk_tokens(self.loss_chunk, self.tokens, spec.vocab_size) if is_whole else None
        vocabulary = -(-spec.vocab_size // self.parallel.tensor)
        return chunk_tokens(self.loss_chunk, self.tokens, vocabulary, hidden=spec.hidden_size, tpu=tpu)

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.precision]

    @property
    def master_bytes(self) -> int:
        """Bytes of a master weight, a moment, an accumulated gradient."""
        return 8 if self.precision == "fp64" else 4

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """Size of every axis."""
        return {axis: int(getattr(self.parallel, axis)) for axis in AXES}

    @property
    def mesh(self) -> str:
        """`fsdp 8 x tensor 4`."""
        sizes = [f"{axis} {getattr(self.parallel, axis)}" for axis in AXES if getattr(self.parallel, axis) > 1]
        return " x ".join(sizes) or "one device"

    def changes(self, config: RunConfig) -> dict[str, object]:
        """What turns a run file into this setting, by dotted key: only what it says otherwise."""
        wanted: dict[str, object] = {f"parallel.{axis}": getattr(self.parallel, axis) for axis in AXES}
        wanted["training.micro_batch"] = self.micro_batch
        if self.backend == "jax":
            wanted["jax.remat"] = self.remat
            wanted["jax.offload_optimizer"] = self.offload_optimizer
        else:
            wanted["deepspeed.zero_stage"] = self.zero_stage
            wanted["deepspeed.activation_checkpointing"] = self.remat == "full"
            wanted["deepspeed.offload_optimizer"] = self.offload_optimizer
            wanted["deepspeed.offload_param"] = "cpu" if self.offload_param else "none"
        if config.parallel.data == -1:  # it takes what the others leave
            del wanted["parallel.data"]
        return {key: value for key, value in wanted.items() if value != _said(config, key)}

    def overrides(self, config: RunConfig) -> tuple[str, ...]:
        """The same as `--set` arguments."""
        return tuple(f"{key}={str(value).lower()}" for key, value in self.changes(config).items())


def _said(config: RunConfig, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


AXES = ("data", "fsdp", "tensor", "context", "expert")


def setting_of(config: RunConfig, backend: BackendName, devices: int, attention: str) -> Setting:
    """The setting that a run file asks for on `devices` devices.  ConfigError when its mesh is not one of that many devices."""
    parallel = config.parallel
    groups = data_parallel(parallel, devices)
    resolved = parallel.model_copy(update={"data": groups // (parallel.fsdp * parallel.expert)})
    deepspeed = config.deepspeed
    setting = Setting(
        backend=backend,
        parallel=resolved,
        sequence=config.data.sequence_length,
        global_batch=config.training.global_batch,
        micro_batch=resolve_batch(config, groups).micro_batch,
        precision=config.training.precision,
        remat=_remat(config, backend),
        attention=attention,
        zero_stage=deepspeed.zero_stage if backend == "deepspeed" else 0,
        offload_optimizer=config.jax.offload_optimizer if backend == "jax" else deepspeed.offload_optimizer,
        offload_param=backend == "deepspeed" and deepspeed.offload_param != "none",
        loss_chunk=config.training.loss_chunk,
        target=target_of(config),
    )
    if setting.devices != devices:
        raise ConfigError(
            "parallel",
            f"the mesh {setting.mesh} has {setting.devices} devices, but there are {devices}; "
            f"set parallel.data to -1, or make the product of the axes {devices}",
        )
    return setting


def target_of(config: RunConfig) -> int | None:
    """Tokens of a target; None without an encoder that reads a source."""
    paired = config.objective.kind in ("seq2seq", "span-corruption")
    return config.data.target_length or config.data.sequence_length if paired else None


def _remat(config: RunConfig, backend: BackendName) -> Remat:
    if backend == "jax":
        return config.jax.remat
    return "full" if config.deepspeed.activation_checkpointing else "none"


def check_setting(config: RunConfig, model: Model, setting: Setting) -> None:
    """ConfigError, naming axis, dimension and size, when a mesh axis does not divide what it cuts.

    The same for what the setting's backend cannot combine, by the tables that it starts with.
    """
    spec, parallel = model.spec, setting.parallel
    cuts: Sequence[tuple[str, int, str, int]] = (
        ("tensor", parallel.tensor, "the number of attention heads", spec.attention.heads),
        ("tensor", parallel.tensor, "the number of key/value heads", spec.attention.kv_heads),
        ("tensor", parallel.tensor, "the MLP's inner size", spec.mlp.size),
        ("context", parallel.context, "the sequence length", setting.sequence),
    )
    if setting.backend == "deepspeed":  # Ulysses gives every device some of the heads
        cuts = (*cuts, ("context", parallel.context * parallel.tensor, "the number of attention heads", spec.attention.heads))
    if spec.mlp.experts is not None:
        cuts = (*cuts, ("expert", parallel.expert, "the number of experts", spec.mlp.experts.count))
    for axis, ways, name, size in cuts:
        if size % ways:
            raise ConfigError(f"parallel.{axis}", f"{ways} does not divide {name}, {size}; use a divisor of {size}")
    if setting.backend == "jax":
        for rule in model.rules:
            shards_of(rule, setting.mesh_sizes)
    applied = changed(config, setting.changes(config)).model_copy(update={"backend": setting.backend})
    check_layout(applied, model, setting.devices)


def axes_of(rule: WeightRule) -> frozenset[str]:
    """Logical axes of a weight, over all its Flax tensors."""
    return frozenset(axis for axes in rule.axes for axis in axes) - {"layers"}


def shards_of(rule: WeightRule, mesh: Mapping[str, int]) -> list[tuple[int, ...]]:
    """Shapes of what one device of a JAX mesh of these sizes holds of a weight."""
    sizes = tuple(mesh.items())
    return [_shard(leaf.axes, stored_shape(leaf, mesh), sizes) for leaf in flax_leaves([rule])]


@lru_cache(maxsize=65536)
def _shard(axes: tuple[str, ...], shape: tuple[int, ...], mesh: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
    return shard_shape(axes, shape, dict(mesh))
