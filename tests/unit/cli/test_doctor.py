"""`jaxllm doctor`, on this machine and on the ones it is for."""

from __future__ import annotations

import importlib.util
import json
import platform
from importlib import metadata
from typing import Any

import jax
import pytest
from click.testing import CliRunner

from jaxllm.cli import doctor as module
from jaxllm.cli.main import main


def test_json() -> None:
    said = CliRunner().invoke(main, ["doctor", "--json"])
    report: dict[str, Any] = json.loads(said.stdout)
    assert report["python"] == platform.python_version()
    assert report["packages"]["jax"] == jax.__version__
    works = {backend["backend"]: backend["works"] for backend in report["backends"]}
    assert works == {"jax": True, "deepspeed": "torch" in report["packages"]}
    assert report["backends"][0]["devices"]
    assert report["requirements"] == []
    assert said.exit_code == 0


def test_text() -> None:
    lines = CliRunner().invoke(main, ["doctor"]).stdout.splitlines()
    assert lines[0].startswith(f"python      {platform.python_version()} on ")
    assert "--backend jax" in lines
    assert "--backend deepspeed" in lines
    installed = importlib.util.find_spec("torch") is not None
    assert sum(line.startswith("  works on ") for line in lines) == 1 + installed


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As if packages were not installed."""
    version = metadata.version

    def lookup(name: str) -> str:
        if name in packages:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(module.metadata, "version", lookup)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch", "deepspeed")
    finding = module.deepspeed_finding()
    assert not finding.works
    assert finding.missing == ["torch and deepspeed not installed"]
    assert finding.remedies == ["pip install 'jaxllm[deepspeed]'"]


@pytest.mark.parametrize(("device", "extra"), [("has_nvidia_gpu", "cuda"), ("has_tpu", "tpu")])
def test_an_accelerator_that_jax_does_not_see(monkeypatch: pytest.MonkeyPatch, device: str, extra: str) -> None:
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: device == "has_nvidia_gpu")
    monkeypatch.setattr(module, "has_tpu", lambda: device == "has_tpu")
    finding = module.jax_finding()
    assert finding.works
    assert finding.remedies == [f"pip install 'jaxllm[{extra}]'"]


def test_a_framework_that_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JAX_PROBE", "raise RuntimeError('no devices: driver is broken')")
    finding = module.jax_finding()
    assert not finding.works
    assert finding.missing == ["RuntimeError: no devices: driver is broken"]


def test_a_framework_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JAX_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(module, "PROBE_SECONDS", 1)
    finding = module.jax_finding()
    assert not finding.works
    assert finding.missing == ["asking for its devices took more than 1 s; is another process holding them?"]


def test_a_package_that_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["click>=8.2", "numpy>=999", "nothing-like-this", "torch>=2; extra == 'deepspeed'"]
    monkeypatch.setattr(module.metadata, "requires", lambda _: required)
    assert list(module.outdated_packages()) == [
        f"numpy is {metadata.version('numpy')}, but jaxllm needs >=999",
        "nothing-like-this is not installed",
    ]
