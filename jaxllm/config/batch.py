"""The batch arithmetic: how a global batch becomes micro-batches on each device, and how many steps a run has."""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.config.schema import ParallelConfig, RunConfig
from jaxllm.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """micro_batch: sequences per device and forward pass.  accumulation: forward passes per optimiser step."""

    micro_batch: int
    accumulation: int


def resolve_batch(config: RunConfig, data_parallel: int) -> BatchPlan:
    """Split the global batch over `data_parallel` devices (or groups of devices) that each see different rows.

    ConfigError when global_batch is not divisible by data_parallel * micro_batch, with the nearest values that are.
    """
    training = config.training
    whole = training.global_batch
    if whole % data_parallel:
        raise ConfigError(
            "training.global_batch",
            f"{whole} sequences cannot be split evenly over {data_parallel} data-parallel devices; "
            f"use {_neighbours(whole, data_parallel)}",
        )
    if training.micro_batch is None:
        return BatchPlan(whole // data_parallel, 1)
    if whole % (training.micro_batch * data_parallel):
        per_device = whole // data_parallel
        divisors = [n for n in range(1, per_device + 1) if per_device % n == 0]
        raise ConfigError(
            "training.micro_batch",
            f"global_batch {whole} over {data_parallel} data-parallel devices leaves {per_device} sequences for each, which is "
            f"not a multiple of micro_batch {training.micro_batch}; use a micro_batch of {_listed(divisors)}, "
            f"or a global_batch of {_neighbours(whole, training.micro_batch * data_parallel)}",
        )
    return BatchPlan(training.micro_batch, whole // (training.micro_batch * data_parallel))


def data_parallel(parallel: ParallelConfig, devices: int) -> int:
    """How many groups of devices see different rows: data * fsdp * expert.  `data: -1`: every device the others leave.

    ConfigError when the mesh needs more devices than there are, or `data: -1` does not come out even.
    """
    others = parallel.fsdp * parallel.tensor * parallel.context * parallel.expert
    sizes = ", ".join(f"{axis} {getattr(parallel, axis)}" for axis in ("fsdp", "tensor", "context", "expert"))
    if parallel.data == -1:
        if devices % others:
            raise ConfigError(
                "parallel.data",
                f"-1 takes every device that the other axes leave, but {devices} are not a multiple of {others} ({sizes})",
            )
        return devices // others * parallel.fsdp * parallel.expert
    if parallel.data * others > devices:
        raise ConfigError(
            "parallel",
            f"the mesh of data {parallel.data}, {sizes} needs {parallel.data * others} devices, but there are {devices}",
        )
    return parallel.data * parallel.fsdp * parallel.expert


def total_steps(config: RunConfig) -> int:
    """Optimiser steps of the run: `training.steps`, or `training.tokens` rounded up to whole steps."""
    training = config.training
    if training.steps is not None:
        return training.steps
    assert training.tokens is not None  # noqa: S101 - the schema demands one of the two
    return -(-training.tokens // tokens_per_step(config))


def tokens_per_step(config: RunConfig) -> int:
    """Tokens, padding included, that one optimiser step reads; of an encoder-decoder those of sources and of targets."""
    source = config.data.sequence_length
    paired = config.objective.kind in ("seq2seq", "span-corruption")
    return config.training.global_batch * (source + (config.data.target_length or source if paired else 0))


def _neighbours(value: int, divisor: int) -> str:
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return f"{below} or {above}" if below else str(above)


def _listed(values: list[int], limit: int = 8) -> str:
    shown = values if len(values) <= limit else [*values[: limit // 2], *values[-limit // 2 :]]
    return " or ".join(map(str, shown)) if len(shown) < 3 else f"{', '.join(map(str, shown[:-1]))} or {shown[-1]}"
