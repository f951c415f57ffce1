"""Starting from a Hugging Face folder: a head that it lacks starts fresh, everything else must be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.config.schema import ModelConfig
from jaxllm.errors import CheckpointError
from jaxllm.families import Task, resolve_model
from jaxllm.state.initial import InitialWeights, compare_folder, pretrained_weights

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
CLASSES = {
    "masked-lm": "MaskedLM",
    "sequence-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
}


@pytest.mark.parametrize("head", TASKS)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_names_and_shapes_are_those_of_transformers(family: str, head: str, tmp_path: Path) -> None:
    """Every weight of the folder is used, bit for bit, and nothing is missing."""
    task = TASKS[head]
    config = transformers.AutoConfig.for_model(family, num_labels=len(task.labels) or 2, **SIZES)
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
