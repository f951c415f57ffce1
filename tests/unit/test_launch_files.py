"""Commands that people copy: in `configs/launch/` and in the docs' pages about launching."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import yaml

from jaxllm.cli.main import VERBS, main
from jaxllm.cli.run_summary import resolve
from jaxllm.config import RunConfig, load_run
from jaxllm.planning.devices import parse_devices
from jaxllm.planning.search import as_written, backends_on
from jaxllm.planning.utilization import expected_utilization

ROOT = Path(__file__).parents[2]
LAUNCH = sorted(path for path in (ROOT / "configs/launch").iterdir() if path.name != "hostfile")
PAGES = [ROOT / "docs/tpu.md", ROOT / "docs/planning.md"]
COMMAND = re.compile(r"(?<![\w/.-])(?:[~.\w/]*/bin/)?jaxllm (" + "|".join(VERBS) + r")\b([^|&;>`#]*)")


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """Every `jaxllm VERB ...` of a file, continuation lines joined; of a page only what stands in a block."""
    text = path.read_text()
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    if path.suffix == ".yaml":  # a folded block continues over lines
        text = re.sub(r"\n\s+(?=--)", " ", text)
    found = []
    for line in text.splitlines():
        for match in COMMAND.finditer(line):
            arguments = match.group(2).rstrip("'\" \\").replace("'", " ").replace('"', " ")
            found.append((match.group(1), shlex.split(arguments)))
    return found


def parsed(verb: str, arguments: list[str]) -> dict[str, object]:
    """The parameters of a command line, as click reads them; click.UsageError for a flag that does not exist."""
    context = click.Context(main)
    command = main.get_command(context, verb)
    assert command is not None
    if isinstance(command, click.Group):
        inner = command.get_command(context, arguments[0])
        assert inner is not None, arguments[0]
        command, arguments = inner, arguments[1:]
    return dict(command.make_context(verb, list(arguments)).params)


def config_of(params: dict[str, object]) -> RunConfig:
    file, overrides = params["file"], params["overrides"]
    assert isinstance(file, Path)
    assert isinstance(overrides, tuple)
    return load_run(ROOT / file, overrides).config


@pytest.mark.parametrize("path", [*LAUNCH, *PAGES], ids=lambda path: path.name)
def test_flags_files_and_keys_exist(path: Path) -> None:
    found = commands(path)
    assert found, "no command was found"
    for verb, arguments in found:
        params = parsed(verb, arguments)
        if "file" in params:
            config_of(params)


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_the_mesh_is_one_of_the_chips_that_are_named_and_fits(path: Path) -> None:
    chips = re.findall(r"^# chips: (\S+)$", path.read_text(), re.MULTILINE)
    devices = parse_devices(chips[0])
    trained = [parsed(verb, arguments) for verb, arguments in commands(path) if verb == "train"]
    assert len(chips) == 1
    assert trained
    for params in trained:
        assert params["resume"] is True
        config = config_of(params)
        backend = params["backend"] or config.backend
        assert backend in backends_on(devices)
        model = resolve(config)
        written = as_written(config, model, backend, devices, expected_utilization(devices.chip, model.parameters))
        assert written.setting.devices == devices.count
        assert written.memory.peak < devices.usable_bytes


@pytest.mark.parametrize("path", [path for path in LAUNCH if path.suffix in (".sh", ".sbatch")], ids=lambda path: path.name)
def test_scripts_are_valid_shell(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, check=False).returncode == 0
    assert "set -euo pipefail" in path.read_text()


@pytest.mark.parametrize("path", [path for path in LAUNCH if path.suffix == ".yaml"], ids=lambda path: path.name)
def test_yaml_files_are_valid(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_launchers_files_agree_with_each_other() -> None:
    hosts = [line.split() for line in (ROOT / "configs/launch/hostfile").read_text().splitlines()]
    slots = sum(int(slots.removeprefix("slots=")) for _, slots in hosts)
    script = (ROOT / "configs/launch/deepspeed.sh").read_text()
    assert slots == parse_devices(re.findall(r"# chips: (\S+)", script)[0]).count
    assert f"--master_addr={hosts[0][0]}" in script
    for name in ("slurm-deepspeed.sbatch", "slurm-jax.sbatch"):
        header = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", (ROOT / "configs/launch" / name).read_text(), re.MULTILINE))
        assert int(header["nodes"]) * int(header["gpus-per-node"]) == 16


def test_a_flag_that_does_not_exist_is_found() -> None:
    with pytest.raises(click.UsageError, match="--restart"):
        parsed("train", ["configs/quickstart.yaml", "--restart"])
