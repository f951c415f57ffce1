"""The list of verbs, and errors as one sentence on stderr."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from jaxllm import __version__
from jaxllm.cli.main import VERBS, main
from jaxllm.cli.options import handle_errors, run_file_options
from jaxllm.errors import ConfigError, DataError
from tests.unit.config.example import EXAMPLE


@pytest.mark.parametrize("name", VERBS)
def test_the_list_says_what_the_verb_says(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert isinstance(command, click.Command)
    assert command.name == name
    assert VERBS[name].help.endswith(".")
    assert len(VERBS[name].help) <= 70


def test_help_lists_every_verb() -> None:
    said = CliRunner().invoke(main, ["--help"])
    assert said.exit_code == 0
    for name, verb in VERBS.items():
        assert f"  {name}" in said.output
        assert verb.help in said.output


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"jaxllm {__version__}\n"


@pytest.mark.parametrize("name", VERBS)
def test_help_keeps_the_lines_of_examples(name: str) -> None:
    shown = CliRunner().invoke(main, [name, "--help"]).output
    assert shown.startswith("Usage:")
    assert "\\b" not in shown


def test_unknown_verb() -> None:
    said = CliRunner().invoke(main, ["trian"])
    assert said.exit_code == 2
    assert "No such command 'trian'." in said.output


def test_module_and_script_are_the_same() -> None:
    done = subprocess.run([sys.executable, "-m", "jaxllm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"jaxllm {__version__}\n"


# --------------------------------------------------------------------------------------------------------------- errors


def command_that_raises(error: BaseException) -> click.Command:
    @click.command()
    @run_file_options
    @handle_errors
    def command(file: Path, overrides: tuple[str, ...]) -> None:
        raise error

    return command


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(EXAMPLE)
    return file


def test_a_config_error_found_late_is_given_its_line(run_file: Path) -> None:
    said = CliRunner().invoke(command_that_raises(ConfigError("training.global_batch", "is odd")), [str(run_file)])
    assert (said.exit_code, said.stdout) == (1, "")
    assert said.stderr == f"{run_file}:17: training.global_batch: is odd\n"


def test_a_config_error_found_late_is_given_its_override(run_file: Path) -> None:
    arguments = [str(run_file), "--set", "training.global_batch=3", "--set", "seed=2"]
    said = CliRunner().invoke(command_that_raises(ConfigError("training.global_batch", "is odd")), arguments)
    assert said.stderr == "--set training.global_batch=3: training.global_batch: is odd\n"


def test_a_config_error_without_its_file_is_still_a_sentence(tmp_path: Path) -> None:
    said = CliRunner().invoke(command_that_raises(ConfigError("seed", "is odd")), [str(tmp_path / "gone.yaml")])
    assert (said.exit_code, said.stderr) == (1, "seed: is odd\n")


def test_other_errors(run_file: Path) -> None:
    said = CliRunner().invoke(command_that_raises(DataError("a.jsonl:3: is not JSON")), [str(run_file)])
    assert (said.exit_code, said.stdout, said.stderr) == (1, "", "error: a.jsonl:3: is not JSON\n")


def test_interrupt(run_file: Path) -> None:
    said = CliRunner().invoke(command_that_raises(KeyboardInterrupt()), [str(run_file)])
    assert (said.exit_code, said.stderr) == (130, "interrupted\n")


def test_a_bug_is_not_dressed_up(run_file: Path) -> None:
    said = CliRunner().invoke(command_that_raises(ZeroDivisionError("bug")), [str(run_file)])
    assert isinstance(said.exception, ZeroDivisionError)


def test_a_reader_that_leaves_is_no_error() -> None:
    """`jaxllm config schema | head -1` ends without a traceback."""
    line = f"{sys.executable} -m jaxllm config schema | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "{"
    assert done.stderr == ""


def _numpy() -> None:
    import numpy as np

    np.empty(2**60, np.uint8)


def _torch() -> None:
    torch = pytest.importorskip("torch", reason="whose memory runs out")
    torch.empty(2**60, dtype=torch.uint8)


def _jax() -> None:
    import jax

    jax.block_until_ready(jax.numpy.zeros(2**50, "uint8"))


@pytest.mark.parametrize(("ask", "size"), [(_numpy, "1.00 EiB"), (_torch, str(2**60)), (_jax, str(2**50))])
def test_memory_that_runs_out_is_one_sentence(ask: Callable[[], None], size: str) -> None:
    """Of every library's own, with what it was asked for."""
    said = CliRunner().invoke(click.command()(handle_errors(ask)))
    assert said.exit_code == 1
    assert said.stderr.startswith("error: memory ran out (")
    assert said.stderr.count("\n") == 1
    assert size in said.stderr
    assert "training.micro_batch" in said.stderr


def test_other_errors_of_a_runtime_stay_what_they_are() -> None:
    @click.command()
    @handle_errors
    def fails() -> None:
        raise RuntimeError("INTERNAL: a bug")

    assert isinstance(CliRunner().invoke(fails).exception, RuntimeError)
