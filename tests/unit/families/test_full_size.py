"""Every full-size config builds on both sides, without a weight, with the parameters that transformers has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from jaxllm.config import load_run
from jaxllm.config.schema import ModelConfig
from jaxllm.families import FAMILIES, Model, Vocabulary, flatten, flax_leaves, resolve_model, task_of

torch = pytest.importorskip("torch", reason="needs the deepspeed extra")

ALL = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
CONFIGS = [file for file in ALL if load_run(file).config.model.from_ is None]
# What the hub says of the models that the others take from there: what differs from transformers' defaults of the family.
HUB: dict[str, tuple[str, dict[str, Any]]] = {
    "google-bert/bert-base-uncased": ("bert", {}),
    "google-bert/bert-base-cased": ("bert", {"vocab_size": 28996}),
    "google-t5/t5-base": ("t5", {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}),
    "meta-llama/Llama-3.2-1B": ("llama", dict(load_run(ALL[0].with_name("llama3.2-1b.yaml")).config.model.huggingface)),
}

# Parameters of the published checkpoints, tied weights once, as their model cards or safetensors indices have them.
PUBLISHED = {
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "gemma-2b": 2_506_172_416,
    "gemma2-2b": 2_614_341_888,
    "gemma3-1b": 999_885_952,
    "phi3-mini-4k": 3_821_079_552,
    "olmo2-1b": 1_484_916_736,
    "bert-base": 109_514_298,
    "roberta-base": 124_697_433,
    "t5-small": 60_506_624,
    "t5-1.1-base": 247_577_856,
    "t5-base-cnn-dailymail": 222_903_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}


def model_of(config: Path, folder: Path) -> Model:
    """folder: for the description of a model that the hub has."""
    run = load_run(config).config
    described, size = run.model, Vocabulary(run.model.huggingface.get("vocab_size", 4096))
    if described.from_ is not None:
        family, changes = HUB[described.from_]
        transformers.AutoConfig.for_model(family, **changes).save_pretrained(folder)
        described, size = ModelConfig.model_validate({"from": str(folder)}), Vocabulary(padding=0)
    return resolve_model(described, size, weights=False, task=task_of(run.objective))


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.stem)
def test_a_full_size_model_has_the_parameters_of_transformers_on_both_sides(config: Path, tmp_path: Path) -> None:
    from jaxllm.jax_backend.mesh import single_device_mesh
    from jaxllm.jax_backend.model.runtime import Runtime
    from jaxllm.jax_backend.network import build_network
    from jaxllm.jax_backend.precision import policy_of
    from jaxllm.jax_backend.sharding import Layout

    model = model_of(config, tmp_path)
    described = dict(model.huggingface_config)
    built = transformers.AutoConfig.for_model(**described)
    built.tie_word_embeddings = model.spec.tie_embeddings  # what T5's config says itself, transformers overrides
    with torch.device("meta"):
        reference = getattr(transformers, described["architectures"][0])(built)
    if model.spec.encoder is not None:
        reference.set_input_embeddings(reference.get_input_embeddings())
    theirs = {name: tuple(parameter.shape) for name, parameter in reference.named_parameters()}
    assert {name: rule.shape for name, rule, _ in flatten(model.rules)} == theirs
    assert model.parameters == sum(parameter.numel() for parameter in reference.parameters())
    network = build_network(model.spec, Runtime(policy_of("bf16"), Layout(single_device_mesh())))
    shapes = {path: shape.shape for path, shape in network.shapes.items()}
    assert shapes == {leaf.path: leaf.shape for leaf in flax_leaves(model.rules)}
    if config.stem in PUBLISHED:
        assert model.parameters == PUBLISHED[config.stem]


def test_every_family_has_a_run_file_to_start_from(tmp_path: Path) -> None:
    assert {model_of(config, tmp_path).family for config in CONFIGS} == FAMILIES.keys()
