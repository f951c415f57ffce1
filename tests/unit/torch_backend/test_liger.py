"""Liger's kernels: what is said where they cannot run, and how far a model that computes with them is from one without.

The measurements run where liger-kernel is installed: on a CUDA device, or else in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from jaxllm.backend import create_backend
from jaxllm.errors import BackendError
from jaxllm.families import FAMILIES
from jaxllm.parity.tolerances import TOLERANCES
from jaxllm.torch_backend import liger
from jaxllm.torch_backend.combinations import LIGER_ACTIVATIONS
from tests.distributed.deepspeed_cases import make_run

_MISSING = [package for package in ("liger_kernel", "triton") if find_spec(package) is None]
needs_liger = pytest.mark.skipif(bool(_MISSING), reason=f"{' and '.join(_MISSING)} not installed: pip install 'jaxllm[liger]'")


@cache
def _measured(*arguments: str) -> Any:
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.unit.torch_backend.liger_measure", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_liger
@pytest.mark.parametrize("family", LIGER_ACTIVATIONS)
def test_parity_of_one_pass(family: str) -> None:
    found = _measured()[family]
    assert {name: error for name, error in found["errors"].items() if not error <= TOLERANCES["fp32"].value} == {}
    assert set(found["untouched"].values()) == {0.0}
    mlp = {"phi3": "LigerPhi3SwiGLUMLP", **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "LigerGEGLUMLP")}
    kinds = {"LigerRMSNorm", *([] if family in ("mixtral", "qwen3_moe") else [mlp.get(family, "LigerSwiGLUMLP")])}
    attention = {name for name in found["replaced"] if name.endswith("Attention")}
    assert len(attention) == 1
    assert set(found["replaced"]) == kinds | attention


@needs_liger
def test_training_is_that_without_liger() -> None:
    for name, (without, with_liger) in _measured("training").items():
        assert with_liger == pytest.approx(without, rel=1e-3 if "bf16" in name else TOLERANCES["fp32"].trajectory_loss), name
        assert with_liger != without, name  # the norm of gradients tells that the kernels were there


@needs_liger
def test_the_families_are_those_of_ligers_own_table() -> None:
    table = "from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as table"
    code = f"import json; {table}; print(json.dumps(list(table)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(FAMILIES) & set(json.loads(done.stdout.splitlines()[-1])) == set(LIGER_ACTIVATIONS)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match=r"'liger_kernel'; install it with: pip install 'jaxllm\[liger\]'"):
        liger.check_liger(torch.device("cuda"), "bf16")


def test_a_run_without_cuda_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda _: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    liger.check_liger(torch.device("cuda"), "bf16")
    with pytest.raises(BackendError, match="needs a CUDA device, and this run is on the cpu; set it to false"):
        liger.check_liger(torch.device("cpu"), "fp32")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    liger.check_liger(torch.device("cpu"), "fp32")
    with pytest.raises(BackendError, match="in fp32, in Triton's interpreter"):
        liger.check_liger(torch.device("cpu"), "bf16")
    monkeypatch.delenv("TRITON_INTERPRET")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="needs a CUDA device"):
            create_backend("deepspeed").start(make_run(liger=True), None)
