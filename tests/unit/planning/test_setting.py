from __future__ import annotations

from typing import Any

import pytest

from jaxllm.config import RunConfig
from jaxllm.errors import ConfigError
from jaxllm.families import flax_leaves, resolve_model
from jaxllm.jax_backend.cuts import stored_shape
from jaxllm.jax_backend.mesh import create_mesh
from jaxllm.jax_backend.sharding import parameter_shardings
from jaxllm.planning.setting import Setting, check_setting, setting_of, shards_of
from tests.unit.jax_backend.cases import GPT2, LLAMA, make_run


def config_of(model: dict[str, Any] = LLAMA, **sections: dict[str, Any]) -> RunConfig:
    return make_run(model, **sections).config


@pytest.mark.parametrize("model", [LLAMA, GPT2, {**LLAMA, "vocab_size": 97}], ids=["llama", "gpt2", "odd vocabulary"])
@pytest.mark.parametrize("parallel", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_parts_of_a_device_are_those_of_the_real_shardings(model: dict[str, Any], parallel: dict[str, int]) -> None:
    run = make_run(model, parallel={"data": 1, **parallel}, jax={"cpu_devices": 8})
    mesh = create_mesh(run.config)
    shardings = parameter_shardings(run.model.rules, mesh)
    for rule in run.model.rules:
        shards = [shardings[leaf.path].shard_shape(stored_shape(leaf, mesh.shape)) for leaf in flax_leaves([rule])]
        sizes = dict.fromkeys(("data", "fsdp", "expert", "context", "tensor"), 1) | parallel
        assert shards_of(rule, sizes) == shards, rule.name


def test_a_run_file_becomes_a_setting() -> None:
    config = config_of(parallel={"data": -1, "fsdp": 2}, training={"micro_batch": 2}, jax={"remat": "full"})
    setting = setting_of(config, "jax", 8, "xla")
    assert (setting.parallel.data, setting.groups, setting.accumulation, setting.tokens) == (4, 8, 1, 64)
    assert setting.overrides(config) == ()
    other = setting_of(config_of(parallel={"data": 2, "fsdp": 4}), "jax", 8, "xla")
    assert other.overrides(config) == ("parallel.fsdp=4", "jax.remat=none")


def test_a_mesh_of_another_number_of_devices_is_refused() -> None:
    config = config_of(parallel={"data": 2, "fsdp": 2})
    with pytest.raises(ConfigError, match=r"the mesh data 2 x fsdp 2 has 4 devices, but there are 8; set parallel.data to -1"):
        setting_of(config, "jax", 8, "xla")
    with pytest.raises(ConfigError, match="needs 4 devices, but there are 3"):
        setting_of(config, "jax", 3, "xla")


@pytest.mark.parametrize(
    ("parallel", "sentence"),
    [
        ({"tensor": 3}, "parallel.tensor: 3 does not divide the number of attention heads, 4; use a divisor of 4"),
        ({"tensor": 4}, "parallel.tensor: 4 does not divide the number of key/value heads, 2"),
        ({"context": 3}, "parallel.context: 3 does not divide the sequence length, 32"),
        ({"fsdp": 3}, "parallel.fsdp: 3 does not divide the hidden size (embed = 32)"),
    ],
)
def test_what_does_not_divide_is_named(parallel: dict[str, int], sentence: str) -> None:
    config = config_of(parallel={"data": 1, **parallel}, training={"global_batch": 3})
    model = resolve_model(config.model)
    setting = setting_of(config, "jax", 3 if 3 in parallel.values() else 4, "xla")
    with pytest.raises(ConfigError) as caught:
        check_setting(config, model, setting)
    assert str(caught.value).startswith(sentence)


def test_ulysses_gives_every_device_whole_heads() -> None:
    config = config_of(parallel={"data": 1, "context": 8})
    setting = setting_of(config, "deepspeed", 8, "sdpa")
    assert isinstance(setting, Setting)
    with pytest.raises(ConfigError, match="8 does not divide the number of attention heads"):
        check_setting(config, resolve_model(config.model), setting)
