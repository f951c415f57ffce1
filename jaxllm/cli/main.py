"""`jaxllm`: the verbs, listed without importing any of them."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import click

from jaxllm import __version__


class Verb(NamedTuple):
    """Where a verb lives (its module has a click command of the verb's name) and its line in the list."""

    module: str
    help: str


VERBS = {
    "train": Verb("jaxllm.cli.train", "Train a model as a run file says, or resume it."),
    "eval": Verb("jaxllm.cli.eval", "Measure how good a trained model is."),
    "generate": Verb("jaxllm.cli.generate", "Continue a prompt with a trained model."),
    "export": Verb("jaxllm.cli.export", "Write a trained model as a folder that transformers loads."),
    "parity": Verb("jaxllm.cli.parity", "Measure how far JAX and PyTorch + DeepSpeed are apart on a run file."),
    "plan": Verb("jaxllm.cli.plan", "Say where a run fits, what it costs, and which settings are best."),
    "compile": Verb("jaxllm.cli.compile", "Compile the training step for a TPU topology, without a TPU."),
    "bench": Verb("jaxllm.cli.bench", "Measure how fast a run file trains on this machine."),
    "data": Verb("jaxllm.cli.data", "Prepare, show and hash the data of a run file."),
    "config": Verb("jaxllm.cli.config", "Check and show run files, and print their schema."),
    "doctor": Verb("jaxllm.cli.doctor", "Show versions and devices, and what is missing."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """The verbs, in the order a person meets them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        """Import the verb."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(VERBS[cmd_name].module)
        command = getattr(module, cmd_name, None) or getattr(module, f"{cmd_name}_")  # a verb may be a name of Python's
        assert isinstance(command, click.Command)  # noqa: S101 - the table above is wrong otherwise
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        """List the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="jaxllm", message="%(prog)s %(version)s")
def main() -> None:
    """Train a language model from one run file, under JAX or under PyTorch + DeepSpeed.

    Begin with: jaxllm train configs/quickstart.yaml
    """
