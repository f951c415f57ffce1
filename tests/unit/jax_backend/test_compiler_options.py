"""What the compiler is told of a training step."""

from __future__ import annotations

from importlib.metadata import version

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxllm.jax_backend import compiler_options
from jaxllm.jax_backend.mesh import MESH_AXES, single_device_mesh


def several_devices() -> Mesh:
    return Mesh(np.array(jax.devices()[:2]).reshape([2 if axis == "fsdp" else 1 for axis in MESH_AXES]), MESH_AXES)


def test_one_cpu_is_told_of_its_vectors() -> None:
    assert compiler_options.compiler_options(single_device_mesh()) == {"xla_cpu_prefer_vector_width": "512"}


def test_an_option_that_the_installed_compiler_has_is_kept() -> None:
    if tuple(map(int, version("jaxlib").split(".")[:2])) >= (0, 12):
        pytest.skip("this jaxlib has one kind of emitters only")
    assert compiler_options.compiler_options(several_devices()) == {"xla_cpu_use_fusion_emitters": False}


def test_an_option_that_the_installed_compiler_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"cpu": {"xla_cpu_no_such_thing": True, "xla_cpu_enable_fast_math": False}}
    monkeypatch.setattr(compiler_options, "OPTIONS", table)
    assert compiler_options.compiler_options(several_devices()) == {"xla_cpu_enable_fast_math": False}


def test_a_value_that_an_option_cannot_have_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_options, "OPTIONS", {"cpu": {"xla_backend_optimization_level": "none at all"}})
    with pytest.raises(jax.errors.JaxRuntimeError, match="none at all"):
        compiler_options.compiler_options(several_devices())


def test_several_gpus_get_an_option_that_this_jaxlib_knows() -> None:
    for name, value in compiler_options.OPTIONS["gpu"].items():
        jax.jit(lambda x: x, compiler_options={name: value}).lower(1).compile()
