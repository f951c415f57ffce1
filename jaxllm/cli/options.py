"""What verbs share: the run file with its overrides, and errors as one sentence each."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import click

from jaxllm.errors import ConfigError, JaxllmError

P = ParamSpec("P")
R = TypeVar("R")


def run_file_options(command: Callable[P, R]) -> Callable[P, R]:
    """Give a verb the parameters `file: Path` (FILE) and `overrides: tuple[str, ...]` (each `--set a.b=value`)."""
    command = set_option("training.steps=10")(command)
    return click.argument("file", metavar="FILE", type=click.Path(path_type=Path))(command)


def set_option(example: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a verb the parameter `overrides: tuple[str, ...]` (each `--set a.b=value`).  example: one of them."""
    said = f"Change a key of the run file, for example --set {example}; the value is YAML. May be repeated."
    return click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=said)


class Host(NamedTuple):
    """Which of several hosts this is, as far as the command line says."""

    coordinator: str | None
    process_index: int | None
    process_count: int | None


def host_options(command: Callable[..., R]) -> Callable[..., R]:
    """Give a verb the parameter `host: Host` (`--coordinator`, `--process-index`, `--process-count`)."""

    @functools.wraps(command)
    def wrapped(*args: Any, coordinator: str | None, process_index: int | None, process_count: int | None, **kwargs: Any) -> R:
        return command(*args, host=Host(coordinator, process_index, process_count), **kwargs)

    told = "JAX on several hosts, each of which runs this command: "
    for option in (
        click.option("--process-count", type=int, help="How many processes the hosts run."),
        click.option(
            "--process-index", type=int, help="Which of them this is, from 0. SLURM, MPI and TPU pods say both themselves."
        ),
        click.option("--coordinator", metavar="HOST:PORT", help=told + "an address of process 0."),
    ):
        wrapped = option(wrapped)
    return wrapped


def handle_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Print a JaxllmError as its sentence on stderr and exit with 1; exit with 130 after an interrupt.

    Memory that runs out, of devices or of the host, is such an error, too.  A ConfigError that was raised after loading is told
    its `FILE:LINE` from the verb's own `file` and `overrides`.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except JaxllmError as error:
            error = _placed(error) if isinstance(error, ConfigError) else error
            click.echo(f"error: {error}" if not isinstance(error, ConfigError) else str(error), err=True)
            sys.exit(1)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            click.echo(f"error: {_out_of_memory(error)}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except BrokenPipeError:
            # The reader (`| head`) has left; the interpreter must not fail again while flushing at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)

    return wrapped


def _is_out_of_memory(error: Exception) -> bool:
    """Of numpy, JAX or torch, none of which is imported for that."""
    said = any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "DefaultCPUAllocator: can't allocate memory"))
    return isinstance(error, MemoryError) or said or type(error).__name__ == "OutOfMemoryError"


def _out_of_memory(error: Exception) -> str:
    first = next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"memory ran out ({first}); a smaller training.micro_batch, jax.remat or deepspeed.activation_checkpointing needs "
        "less, and `jaxllm plan FILE` lists settings that fit"
    )


def _placed(error: ConfigError) -> ConfigError:
    context = click.get_current_context(silent=True)
    file = context.params.get("file") if context else None
    if context is None or not isinstance(file, Path):
        return error
    from jaxllm.config.loading import read_origins

    try:
        return read_origins(file, context.params.get("overrides") or ()).place(error)
    except ConfigError:  # the file has changed or gone since it was loaded
        return error
