"""Experts of a checkpoint that holds each by itself, read as the one tensor that transformers makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxllm.config.schema import ModelConfig
from jaxllm.errors import CheckpointError
from jaxllm.families import flatten, resolve_model
from jaxllm.state.initial import compare_folder, pretrained_weights
from tests.tiny import tiny

torch = pytest.importorskip("torch", reason="needs the deepspeed extra")
transformers = pytest.importorskip("transformers")

INDICES = [
    (slice(1, 3), slice(0, 5), slice(2, 9)),
    (slice(7, 8), slice(10, 40), slice(None)),
    (slice(None), slice(19, 21), slice(0, 1)),
    (slice(2, 2), slice(0, 4), slice(0, 4)),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_published_layout_is_read_lazily_and_bit_for_bit(family: str, dtype: str, tmp_path: Path) -> None:
    described = resolve_model(ModelConfig.model_validate(tiny(family, vocab_size=96))).huggingface_config
    reference = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**dict(described)), dtype=getattr(torch, dtype)
    )
    reference.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = resolve_model(ModelConfig.model_validate({"from": str(tmp_path)}))
    found = compare_folder(model, tmp_path)
    assert found.pieces
    assert not found.missing
    assert not found.unused
    reader = pretrained_weights(model, tmp_path)
    wanted = {name: values.float().numpy() for name, values in reference.state_dict().items()}
    assert set(reader.names()) == {name for name, _, _ in flatten(model.rules)}
    for name, rule, _ in flatten(model.rules):
        assert reader.shape(name) == rule.shape
        np.testing.assert_array_equal(reader.read(name), wanted[name])
        if name.endswith("gate_up_proj"):
            for index in INDICES:
                np.testing.assert_array_equal(reader.read(name, index), wanted[name][index])


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    described = resolve_model(ModelConfig.model_validate(tiny("mixtral", vocab_size=96))).huggingface_config
    reference = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**dict(described)))
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    model = resolve_model(ModelConfig.model_validate({"from": str(tmp_path)}))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        pretrained_weights(model, tmp_path)
