"""A setting: everything beside the model that decides how much memory one device needs and how fast it goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxllm.config import RunConfig, resolve_batch
from jaxllm.config.batch import data_parallel
from jaxllm.config.loss_chunk import LossChunk, chunk_tokens
from jaxllm.config.remat import RematPolicy
from jaxllm.config.schema import BackendName, ParallelConfig, Precision
from jaxllm.errors import ConfigError
from jaxllm.families import Model
from jaxllm.families.spec import ModelSpec
from jaxllm.families.weights import WeightRule

Remat = RematPolicy | tuple[str, ...]

BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp64": 8}
"""Bytes of an element in the compute dtype."""


@dataclass(frozen=True)
class Setting:
    """One way to run a model on some devices.

    parallel: with every size known.  sequence: tokens of a sequence.  remat: as `jax.remat`; on DeepSpeed `full` is activation
    checkpointing.  attention: the kernel (`xla`, `splash`, `cudnn`; `sdpa`, `eager`).  offload_optimizer: as the backend's key
    of that name; offload_param: weights in the host's memory.  loss_chunk: as `training.loss_chunk`.
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
        """Tokens that one device holds in a forward pass."""
        return self.micro_batch * self.sequence // self.parallel.context

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
    def mesh(self) -> str:
        """`fsdp 8 x tensor 4`."""
        sizes = [f"{axis} {getattr(self.parallel, axis)}" for axis in AXES if getattr(self.parallel, axis) > 1]
        return " x ".join(sizes) or "one device"

    def overrides(self, config: RunConfig) -> tuple[str, ...]:
        """The `--set` arguments that turn a run file into this setting: only what it says otherwise."""
        wanted: dict[str, object] = {f"parallel.{axis}": getattr(self.parallel, axis) for axis in AXES}
        wanted["training.micro_batch"] = self.micro_batch
        if self.backend == "jax":
            wanted["jax.remat"] = self.remat
            wanted["jax.offload_optimizer"] = self.offload_optimizer
        else:
            wanted["deepspeed.zero_stage"] = self.zero_stage
            wanted["deepspeed.activation_checkpointing"] = self.remat == "full"
            wanted["deepspeed.offload_optimizer"] = self.offload_optimizer
        said = []
        for key, value in wanted.items():
            section, name = key.split(".")
            if key == "parallel.data" and config.parallel.data == -1:  # it takes what the others leave
                continue
            if value != getattr(getattr(config, section), name, "none"):
                said.append(f"{key}={str(value).lower()}")
        return tuple(said)


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
        offload_optimizer=str(getattr(config.jax if backend == "jax" else deepspeed, "offload_optimizer", "none")),
        offload_param=backend == "deepspeed" and getattr(deepspeed, "offload_param", "none") != "none",
        loss_chunk=config.training.loss_chunk,
    )
    if setting.devices != devices:
        raise ConfigError(
            "parallel",
            f"the mesh {setting.mesh} has {setting.devices} devices, but there are {devices}; "
            f"set parallel.data to -1, or make the product of the axes {devices}",
        )
    return setting


def _remat(config: RunConfig, backend: BackendName) -> Remat:
    if backend == "jax":
        return config.jax.remat
    return "full" if config.deepspeed.activation_checkpointing else "none"


def check_setting(model: Model, setting: Setting) -> None:
    """ConfigError, naming axis, dimension and size, when a mesh axis does not divide what it cuts."""
    spec, parallel = model.spec, setting.parallel
    cuts: Sequence[tuple[str, int, str, int]] = (
        ("tensor", parallel.tensor, "the number of attention heads", spec.attention.heads),
        ("tensor", parallel.tensor, "the number of key/value heads", spec.attention.kv_heads),
        ("tensor", parallel.tensor, "the MLP's inner size", spec.mlp.size),
        ("context", parallel.context, "the sequence length", setting.sequence),
    )
    if setting.backend == "deepspeed":  # Ulysses gives every device some of the heads
        cuts = (*cuts, ("context", parallel.context * parallel.tensor, "the number of attention heads", spec.attention.heads))
    for axis, ways, name, size in cuts:
        if size % ways:
            raise ConfigError(f"parallel.{axis}", f"{ways} does not divide {name}, {size}; use a divisor of {size}")
    if setting.backend == "jax" and spec.hidden_size % parallel.fsdp:
        raise ConfigError(
            "parallel.fsdp",
            f"{parallel.fsdp} does not divide the hidden size, {spec.hidden_size}; use a divisor of {spec.hidden_size}",
        )


def one_device(setting: Setting) -> Setting:
    """The same micro-batch on one device alone."""
    return replace(setting, parallel=ParallelConfig(data=1), global_batch=setting.micro_batch)


_TENSOR_AXES = frozenset({"heads", "kv_heads", "mlp", "vocab"})


def axes_of(rule: WeightRule) -> frozenset[str]:
    """Logical axes of a weight, over all its Flax tensors."""
    return frozenset(axis for axes in rule.axes for axis in axes) - {"layers"}


def cut_elements(rule: WeightRule, fsdp: int, tensor: int, expert: int) -> int:
    """Elements of a weight that one device of a JAX mesh holds: as `jaxllm.jax_backend.sharding` cuts it."""
    held = 0
    filled = {"vocab": -(-rule.sizes["vocab"] // tensor) * tensor}
    for axes, shape in zip(rule.axes, rule.flax_shapes, strict=True):
        names = set(axes) - {"layers"}
        ways = tensor if names & _TENSOR_AXES else 1
        ways *= expert if "experts" in names else 1
        ways *= fsdp if any(rule.sizes[axis] % fsdp == 0 for axis in names) else 1
        size = math.prod(filled.get(axis, length) for axis, length in zip(axes, shape, strict=True))
        held += -(-size // ways)
    return held
