"""Starting from a Hugging Face folder: a head that it lacks starts fresh, everything else must be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.config.schema import ModelConfig
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.families import Task, Vocabulary, architectures, resolve_model
from jaxllm.state.initial import InitialWeights, check_shapes, compare_folder, pretrained_weights

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
TASKS = {
    "masked-lm": Task("masked-lm"),
    "sequence-classification": Task("sequence-classification", ("a", "b"), "single_label_classification"),
    "token-classification": Task("token-classification", ("a", "b", "c")),
}
_DECODER: dict[str, Any] = {**SIZES, "num_key_value_heads": 1, "pad_token_id": 3}
MODELS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "gpt2": {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20, "pad_token_id": 3},
    **dict.fromkeys(("llama", "mistral", "qwen2", "phi3", "olmo2"), _DECODER),
    **{family: {**_DECODER, "head_dim": 8} for family in ("qwen3", "gemma", "gemma2", "gemma3_text")},
    "mixtral": {**_DECODER, "num_local_experts": 4},
    "qwen3_moe": {**_DECODER, "num_experts": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 2},
}
CLASSES = {
    "masked-lm": "MaskedLM",
    "sequence-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
}


@pytest.mark.parametrize(
    ("family", "head"), [(family, head) for family in MODELS for head in TASKS if head in architectures(family)]
)
def test_names_and_shapes_are_those_of_transformers(family: str, head: str, tmp_path: Path) -> None:
    """Every weight of the folder is used, bit for bit, and nothing is missing."""
    task = TASKS[head]
    config = transformers.AutoConfig.for_model(family, num_labels=len(task.labels) or 2, **MODELS[family])
    model = getattr(transformers, f"AutoModelFor{CLASSES[head]}").from_config(config)
    model.save_pretrained(tmp_path)
    ours = resolve_model(ModelConfig.model_validate({"from": str(tmp_path)}), task=task)
    found = compare_folder(ours, tmp_path)
    assert (found.fresh, found.missing, found.unused) == ((), (), ())
    reader = pretrained_weights(ours, tmp_path)
    for name, value in model.named_parameters():
        np.testing.assert_array_equal(reader.read(name), value.detach().numpy())
    assert sum(parameter.numel() for parameter in model.parameters()) == ours.parameters
    assert ours.huggingface_config["architectures"] == [type(model).__name__]


def test_a_head_that_the_folder_lacks_starts_fresh(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("bert", **SIZES)
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    model = resolve_model(ModelConfig.model_validate({"from": str(tmp_path)}), task=TASKS["sequence-classification"])
    found = compare_folder(model, tmp_path)
    assert set(found.fresh) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert all(name.startswith("cls.predictions") for name in found.unused)
    assert len(found.unused) == 5
    said = list(found.sentences(tmp_path))
    assert "the head starts with fresh weights" in said[0]
    assert "cls.predictions.bias" in said[1]
    reader = pretrained_weights(model, tmp_path, seed=3)
    np.testing.assert_array_equal(reader.read("classifier.weight"), InitialWeights(model, 3).read("classifier.weight"))
    keys = {"family": "bert", **SIZES, "num_hidden_layers": 3}
    wider = resolve_model(ModelConfig.model_validate(keys), task=TASKS["masked-lm"])
    with pytest.raises(CheckpointError, match="lacks"):
        pretrained_weights(wider, tmp_path)


@pytest.mark.parametrize(("kind", "stored"), [("int8", "I8"), ("float8_e4m3fn", "F8_E4M3")])
def test_quantised_weights_are_refused_by_name(kind: str, stored: str, tmp_path: Path) -> None:
    """Also where config.json says nothing of them: as numbers they would be another model."""
    import torch
    from safetensors.torch import load_file, save_file

    transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.for_model("bert", **SIZES)).save_pretrained(tmp_path)
    name, file = "bert.encoder.layer.1.output.dense.weight", tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name].to(getattr(torch, kind))}, file, metadata={"format": "pt"})
    model = resolve_model(ModelConfig.model_validate({"from": str(tmp_path)}), task=TASKS["masked-lm"])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} is stored as {stored}; quantised weights are not"):
        check_shapes(model, pretrained_weights(model, tmp_path))


def test_a_decoder_becomes_a_classifier(tmp_path: Path) -> None:
    """It takes the tokenizer's padding token, which it never needed before, and leaves the head of a language model."""
    config = transformers.AutoConfig.for_model("llama", **{**_DECODER, "pad_token_id": None})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    described = ModelConfig.model_validate({"from": str(tmp_path)})
    task = TASKS["sequence-classification"]
    model = resolve_model(described, Vocabulary(61, end=5, padding=4), task=task)
    assert (model.huggingface_config["pad_token_id"], model.spec.head.padding) == (4, 4)
    assert resolve_model(described, Vocabulary(61, end=5), task=task).spec.head.padding == 5
    assert resolve_model(described, Vocabulary(61, end=5, padding=4)).spec.padding_token is None
    found = compare_folder(model, tmp_path)
    assert (found.fresh, found.missing, found.unused) == (("score.weight",), (), ("lm_head.weight",))
    with pytest.raises(ConfigError, match=r"model\.pad_token_id: is not given, and the tokenizer names neither"):
        resolve_model(described, Vocabulary(61), task=task)


def test_old_spellings_and_bare_models_are_read(tmp_path: Path) -> None:
    """The first BERT checkpoints say gamma and beta, and some hold the encoder alone."""
    from safetensors.numpy import load_file, save_file

    config = transformers.AutoConfig.for_model("bert", **SIZES)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load_file(file).items()
    }
    save_file(renamed, file)
    model = resolve_model(ModelConfig.model_validate({"from": str(tmp_path)}), task=TASKS["sequence-classification"])
    found = compare_folder(model, tmp_path)
    assert set(found.fresh) == {"classifier.weight", "classifier.bias"}
    assert (found.missing, found.unused) == ((), ())
