"""`jaxllm doctor`: versions and devices, and what is missing.

Each framework is asked in a process of its own, so that one that hangs or crashes on this machine is reported like any other
finding.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from jaxllm.cli.options import handle_errors

PROBE_SECONDS = 120

JAX_PROBE = """
import jax, json
devices = jax.devices()
print("\\n" + json.dumps({
    "platform": devices[0].platform,
    "devices": [device.device_kind for device in devices],
    "memory_bytes": (devices[0].memory_stats() or {}).get("bytes_limit"),
}))
"""

TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
count = torch.cuda.device_count() if cuda else 0
print("\\n" + json.dumps({
    "platform": "cuda" if cuda else "cpu",
    "devices": [torch.cuda.get_device_name(i) for i in range(count)] or ["cpu"],
    "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
}))
"""


@dataclass
class Finding:
    """What a backend can do here.  missing: sentences; remedies: command lines that mend them."""

    backend: str
    works: bool
    platform: str | None = None
    devices: list[str] = field(default_factory=list)
    memory_bytes: int | None = None
    missing: list[str] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)

    def lack(self, sentence: str, remedy: str | None = None) -> None:
        """Note something missing and how to get it."""
        self.missing.append(sentence)
        if remedy is not None and remedy not in self.remedies:
            self.remedies.append(remedy)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@handle_errors
def doctor(as_json: bool) -> None:
    """Show versions and devices of both backends, and what is missing with the line that installs it.

    Exits with 1 when a required package is missing or too old, or when neither backend works.
    """
    from jaxllm.metrics.environment import describe_machine, package_versions

    outdated = list(outdated_packages())
    findings = [jax_finding(), deepspeed_finding()]
    report = {
        "python": platform.python_version(),
        "machine": describe_machine(),
        "packages": {"jaxllm": _version("jaxllm"), **package_versions()},
        "requirements": outdated,
        "backends": [vars(finding) for finding in findings],
    }
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(_lines(report, findings)))
    if outdated or not any(finding.works for finding in findings):
        sys.exit(1)


def jax_finding() -> Finding:
    """JAX and its devices."""
    finding = _probe("jax", JAX_PROBE)
    if _version("jax") is None:
        finding.lack("jax is not installed", "pip install jaxllm")
    if finding.platform == "cpu" and has_nvidia_gpu():
        finding.lack("there is an NVIDIA GPU, but JAX sees only the CPU", "pip install 'jaxllm[cuda]'")
    if finding.platform == "cpu" and has_tpu():
        finding.lack("there is a TPU, but JAX sees only the CPU", "pip install 'jaxllm[tpu]'")
    return finding


def deepspeed_finding() -> Finding:
    """PyTorch, DeepSpeed and their devices."""
    absent = [package for package in ("torch", "deepspeed") if _version(package) is None]
    if absent:
        finding = Finding("deepspeed", works=False)
        finding.lack(f"{' and '.join(absent)} not installed", "pip install 'jaxllm[deepspeed]'")
        return finding
    finding = _probe("deepspeed", TORCH_PROBE)
    if finding.works and finding.platform == "cpu" and has_nvidia_gpu():
        finding.lack("there is an NVIDIA GPU, but this PyTorch sees only the CPU", "pip install --force-reinstall torch")
    return finding


def has_nvidia_gpu() -> bool:
    """Whether the system shows an NVIDIA GPU, whatever the frameworks say."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def has_tpu() -> bool:
    """Whether the system shows a TPU, whatever JAX says."""
    if any(Path("/dev").glob("accel[0-9]*")):
        return True
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(Path("/dev/vfio").glob("[0-9]*")) and any(vendor.read_text().strip() == "0x1ae0" for vendor in vendors)


def outdated_packages() -> Iterator[str]:
    """What jaxllm requires and is not installed, or is installed in another version, one sentence each."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield "packaging is not installed"
        return
    try:
        required = metadata.requires("jaxllm") or []
    except metadata.PackageNotFoundError:
        return  # run from a source tree: nothing says what is required
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None:
            yield f"{requirement.name} is not installed"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} is {version}, but jaxllm needs {requirement.specifier}"


def _probe(backend: str, program: str) -> Finding:
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        finding = Finding(backend, works=False)
        finding.lack(f"asking for its devices took more than {PROBE_SECONDS} s; is another process holding them?")
        return finding
    if done.returncode != 0:
        finding = Finding(backend, works=False)
        finding.lack(next(reversed(done.stderr.strip().splitlines()), f"its process ended with status {done.returncode}"))
        return finding
    said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return Finding(backend, True, said["platform"], said["devices"], said["memory_bytes"])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _lines(report: dict[str, Any], findings: list[Finding]) -> Iterator[str]:
    machine = report["machine"]
    yield f"python      {report['python']} on {machine['platform']}"
    yield f"machine     {machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_bytes'] / 2**30:.1f} GiB"
    yield "packages"
    width = max(map(len, report["packages"]))
    for package, version in report["packages"].items():
        yield f"  {package.ljust(width)}  {version or 'not installed'}"
    for sentence in report["requirements"]:
        yield f"  needed: {sentence}"
    for finding in findings:
        yield f"--backend {finding.backend}"
        if finding.works:
            memory = f", {finding.memory_bytes / 2**30:.1f} GiB each" if finding.memory_bytes else ""
            kinds = ", ".join(f"{finding.devices.count(kind)} x {kind}" for kind in dict.fromkeys(finding.devices))
            yield f"  works on {finding.platform}: {kinds}{memory}"
        for sentence in finding.missing:
            yield f"  {'note' if finding.works else 'does not work'}: {sentence}"
        for remedy in finding.remedies:
            yield f"  install: {remedy}"
