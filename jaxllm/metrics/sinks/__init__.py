"""Where a run's records go: the terminal, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from jaxllm.config.schema import RunConfig
from jaxllm.metrics.sinks.base import Sink, Sinks
from jaxllm.metrics.sinks.console import ConsoleSink
from jaxllm.metrics.sinks.jsonl import JsonlSink, parse_metrics
from jaxllm.metrics.sinks.tensorboard import TensorBoardSink
from jaxllm.metrics.sinks.wandb import WandbSink

__all__ = ["Sink", "Sinks", "make_sinks", "parse_metrics"]


def make_sinks(config: RunConfig, folder: Path, console: Console) -> Sinks:
    """The sinks that `logging.sinks` names, writing below the run folder.  ConfigError when one lacks its package."""
    return Sinks([_make(name, config, folder, console) for name in dict.fromkeys(config.logging.sinks)])


def _make(name: str, config: RunConfig, folder: Path, console: Console) -> Sink:
    match name:
        case "console":
            return ConsoleSink(console, config.name)
        case "jsonl":
            return JsonlSink(folder / "metrics.jsonl")
        case "tensorboard":
            return TensorBoardSink(folder / "tensorboard")
        case "wandb":
            return WandbSink(config, folder)
        case _:
            raise ValueError(f"no sink {name!r}")
