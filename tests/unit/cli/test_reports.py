"""Reports: a file that cannot be written is found out before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from jaxllm.cli.main import main
from jaxllm.cli.reports import check_writable, write_json
from jaxllm.errors import JaxllmError

FILE = "configs/quickstart.yaml"


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.json", None)
    write_json(tmp_path / "new.json", {"a": [1, None]})
    write_json(None, {"a": 1})
    assert json.loads((tmp_path / "new.json").read_text()) == {"a": [1, None]}
    assert list(tmp_path.iterdir()) == [tmp_path / "new.json"]


def test_folders_and_missing_folders_are_refused(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "missing" / "new.json"):
        with pytest.raises(JaxllmError, match="cannot write"):
            check_writable(file)


@pytest.mark.parametrize(
    "arguments",
    [["bench", FILE], ["plan", FILE], ["parity", FILE], ["compile", FILE, "--topology", "v5e:2x2"]],
    ids=lambda a: a[0],
)
def test_every_verb_that_measures_says_so_first(arguments: list[str]) -> None:
    done = CliRunner().invoke(main, [*arguments, "--json", "/proc/nowhere/out.json"])
    assert done.exit_code == 1
    assert done.output.startswith("error: cannot write /proc/nowhere/out.json")
