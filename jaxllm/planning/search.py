"""Settings that fit on some devices, best first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from jaxllm.config import RunConfig
from jaxllm.config.schema import BackendName, ParallelConfig
from jaxllm.errors import ConfigError
from jaxllm.families import Model
from jaxllm.planning.deepspeed_memory import deepspeed_memory
from jaxllm.planning.devices import Devices
from jaxllm.planning.jax_memory import jax_memory
from jaxllm.planning.memory import Memory
from jaxllm.planning.setting import Remat, Setting, check_setting, setting_of, target_of
from jaxllm.planning.speed import Speed, speed
from jaxllm.planning.utilization import Utilization

ROOM = 0.9
"""Share of the usable memory that a setting may fill to be recommended before others of the same speed."""

LONG = 16_384
"""Tokens of a sequence from which on cutting the sequence is tried."""


@dataclass(frozen=True)
class Candidate:
    """A setting with its memory and speed.  overrides: what must be set for it beside the run file."""

    setting: Setting
    memory: Memory
    speed: Speed
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """What a search has found.  fitting: best first.  smallest: of all settings, the one that needs least memory."""

    fitting: list[Candidate]
    smallest: Candidate | None


def attention_of(config: RunConfig, model: Model, backend: BackendName, devices: Devices, context: int) -> str:
    """The attention kernel a run would use on these devices.  context: how many share a sequence."""
    if backend == "deepspeed":
        return torch_attention(config, model)
    if context > 1:
        return "ring"
    if config.jax.attention != "auto":
        return config.jax.attention
    if devices.chip.kind == "tpu":
        return tpu_attention(config, model)
    if model.spec.encoder is not None or model.spec.attention.dropout or config.training.precision != "bf16":
        return "xla"
    return "xla" if "MI300" in devices.chip.name else "cudnn"


def tpu_attention(config: RunConfig, model: Model) -> str:
    """What `auto` takes on a TPU: the splash kernel, where it can do what the model asks for."""
    spec = model.spec
    plain = spec.encoder is None and not spec.attention.dropout and config.training.precision != "fp64"
    return "splash" if plain and config.data.sequence_length % 128 == 0 else "xla"


def torch_attention(config: RunConfig, model: Model) -> str:
    """The Hugging Face model's attention: `auto` is sdpa, but for models that cap their scores."""
    wanted = config.deepspeed.attention
    capped = any(attention.softcap for attention in model.spec.attentions)
    return ("eager" if capped else "sdpa") if wanted == "auto" else wanted


def backends_on(devices: Devices) -> tuple[BackendName, ...]:
    """Backends that run on a chip: DeepSpeed has no TPUs."""
    return ("jax",) if devices.chip.kind == "tpu" else ("jax", "deepspeed")


def memory_of(model: Model, setting: Setting, devices: Devices) -> Memory:
    """Memory of one device."""
    if setting.backend == "jax":
        return jax_memory(model, setting, "tpu" if devices.chip.kind == "tpu" else "gpu")
    return deepspeed_memory(model, setting)


def as_written(config: RunConfig, model: Model, backend: BackendName, devices: Devices, use: Utilization) -> Candidate:
    """The run file's own setting.  ConfigError when it is not possible on these devices."""
    attention = attention_of(config, model, backend, devices, config.parallel.context)
    setting = setting_of(config, backend, devices.count, attention)
    check_setting(config, model, setting)
    return Candidate(setting, memory_of(model, setting, devices), speed(model, setting, devices, use), ())


def search(config: RunConfig, model: Model, backend: BackendName, devices: Devices, use: Utilization) -> Found:
    """Every mesh, micro-batch, ZeRO stage and remat policy that the devices and the run's global batch allow.

    The ranking is by time; of equals, those first that leave room for the formulas' error, then those of fewer and larger
    passes, which keep a device busier, then those of less memory.
    """
    fitting: list[Candidate] = []
    smallest: Candidate | None = None
    for setting in _settings(config, model, backend, devices):
        memory = memory_of(model, setting, devices)
        candidate = Candidate(setting, memory, speed(model, setting, devices, use), setting.overrides(config))
        if smallest is None or memory.peak < smallest.memory.peak:
            smallest = candidate
        if memory.peak <= devices.usable_bytes:
            fitting.append(candidate)
    roomy = ROOM * devices.usable_bytes
    fitting.sort(
        key=lambda each: (round(each.speed.seconds, 6), each.memory.peak > roomy, each.setting.accumulation, each.memory.peak)
    )
    return Found(_different(fitting), smallest)


def _different(candidates: list[Candidate]) -> list[Candidate]:
    """The best of each mesh, stage and remat policy: the same with another micro-batch teaches nothing."""
    kept: dict[tuple[object, ...], Candidate] = {}
    for each in candidates:
        setting = each.setting
        kept.setdefault((setting.mesh, setting.remat, setting.zero_stage, setting.offload_optimizer), each)
    return list(kept.values())


def _settings(config: RunConfig, model: Model, backend: BackendName, devices: Devices) -> Iterator[Setting]:
    batch, sequence = config.training.global_batch, config.data.sequence_length
    experts = 1 if model.spec.mlp.experts is None or backend == "deepspeed" else model.spec.mlp.experts.count
    for parallel in _meshes(backend, devices, sequence, experts):
        attention = attention_of(config, model, backend, devices, parallel.context)
        groups = parallel.data * parallel.fsdp * parallel.expert
        if batch % groups:
            continue
        for micro, memory in product(_powers(batch // groups), _savings(backend)):
            remat, stage, offload = memory
            setting = Setting(
                backend, parallel, sequence, batch, micro, config.training.precision, remat, attention, stage, offload,
                loss_chunk=config.training.loss_chunk, target=target_of(config),
            )  # fmt: skip
            if (stage > 0 or parallel.fsdp > 1) and backend == "deepspeed" and not _meaningful(setting):
                continue
            try:
                check_setting(config, model, setting)
            except ConfigError:
                continue
            yield setting


def _meaningful(setting: Setting) -> bool:
    """On DeepSpeed `fsdp` is what ZeRO shares; it has to be all of the groups, and at stage 0 none."""
    groups = setting.groups
    return setting.parallel.fsdp == groups if setting.zero_stage and groups > 1 else setting.parallel.fsdp == 1


def _savings(backend: BackendName) -> list[tuple[Remat, int, str]]:
    """Remat policy, ZeRO stage and offload."""
    if backend == "jax":
        plain: list[tuple[Remat, int, str]] = [(remat, 0, "none") for remat in ("none", "products", "dots", "full", "offload")]
        return [*plain, ("full", 0, "moments"), ("full", 0, "all")]
    plain = [(remat, stage, "none") for remat in ("none", "full") for stage in (0, 1, 2, 3)]
    return [*plain, ("full", 2, "cpu"), ("full", 3, "cpu")]


def _powers(limit: int) -> list[int]:
    """Divisors of the rows of a group that are powers of two, and all of them."""
    found = [1 << power for power in range(8) if limit % (1 << power) == 0]
    return sorted({*found, limit} if limit <= 256 else set(found))


def _meshes(backend: BackendName, devices: Devices, sequence: int, experts: int) -> Iterator[ParallelConfig]:
    """Products of the axes that make up the devices; tensor parallelism stays within a GPU host.  experts: 1 without any."""
    count = devices.count
    host = min(count, devices.chip.chips_per_host * devices.chip.devices_per_chip, 8) if devices.chip.kind == "gpu" else 16
    for tensor in (1, 2, 4, 8, 16):
        for context in (1, 2, 4, 8, 16) if sequence >= LONG else (1,):
            if tensor > host or count % (tensor * context):
                continue
            groups = count // (tensor * context)
            for expert in (size for size in (1, 2, 4, 8, 16) if experts % size == 0 and groups % size == 0):
                for fsdp in _fsdp(backend, groups // expert):
                    data = groups // (expert * fsdp)
                    yield ParallelConfig(data=data, fsdp=fsdp, tensor=tensor, context=context, expert=expert)


def _fsdp(backend: BackendName, groups: int) -> list[int]:
    if backend == "deepspeed":
        return sorted({1, groups})
    return [size for size in range(1, groups + 1) if groups % size == 0 and (size & (size - 1) == 0 or size == groups)]
