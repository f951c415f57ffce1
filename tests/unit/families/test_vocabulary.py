"""The special tokens of a model and of its tokenizer are the same, on both backends, or the run is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.config.schema import ModelConfig
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.errors import ConfigError
from jaxllm.families import Task, Vocabulary, resolve_model
from tests.parity.tasks import MODELS, config
from tests.tiny import tiny

OWN = Vocabulary(300, end=2, begin=0, padding=1)
CLASSIFIER = Task("sequence-classification", ("a", "b"), "single_label_classification")
CASES: list[tuple[dict[str, Any], Task, dict[str, Any]]] = [
    ({"family": "bert"}, Task("masked-lm"), {"pad_token_id": 1}),
    ({"family": "roberta"}, CLASSIFIER, {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}),
    ({"family": "t5"}, Task("seq2seq"), {"pad_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2}),
    ({"family": "llama"}, CLASSIFIER, {"pad_token_id": 1}),
    ({"family": "llama", "pad_token_id": None}, CLASSIFIER, {"pad_token_id": 1}),
    ({"family": "llama"}, Task(), {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 2}),
    ({"family": "olmo2"}, Task(), {"pad_token_id": 1}),
    ({"family": "phi3"}, Task(), {"pad_token_id": 1}),
    ({"family": "gemma", "pad_token_id": None}, Task(), {"pad_token_id": None}),
    ({"family": "gemma", "pad_token_id": 7}, Task(), {"pad_token_id": 7}),
]


@pytest.mark.parametrize(("keys", "task", "expected"), CASES)
def test_the_tokenizer_gives_what_the_run_file_leaves_open(keys: dict[str, Any], task: Task, expected: dict[str, Any]) -> None:
    described = resolve_model(ModelConfig.model_validate(keys), OWN, task=task).huggingface_config
    assert {key: described[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("keys", "task", "message"),
    [
        (
            {"family": "t5", "pad_token_id": 0},
            Task("seq2seq"),
            "model.pad_token_id: 0 is not the tokenizer's, which fills rows up, and a decoder begins, with token 1; leave the",
        ),
        (
            {"family": "t5", "decoder_start_token_id": 0},
            Task("seq2seq"),
            "model: decoder_start_token_id 0 is not pad_token_id 1",
        ),
        (
            {"family": "t5", "eos_token_id": None},
            Task("seq2seq"),
            "model.eos_token_id: null is not the tokenizer's, which ends texts with token 2; leave the key out or set it to 2",
        ),
        (
            {"family": "roberta", "pad_token_id": 0},
            Task("masked-lm"),
            "model.pad_token_id: 0 is not the tokenizer's, which fills rows up with token 1; leave the key out or set it to 1",
        ),
        ({"family": "llama", "pad_token_id": 5}, CLASSIFIER, "model.pad_token_id: 5 is not the tokenizer's"),
    ],
)
def test_another_token_is_refused(keys: dict[str, Any], task: Task, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(ModelConfig.model_validate(keys), OWN, task=task)
    assert str(caught.value).startswith(message)


def test_a_folder_with_another_padding_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta", "vocab_size": 300, "pad_token_id": 3}))
    with pytest.raises(
        ConfigError, match="has pad_token_id 3, but the tokenizer fills rows up with token 1; use the tokenizer"
    ):
        resolve_model(ModelConfig.model_validate({"from": str(tmp_path)}), OWN, task=Task("masked-lm"), weights=False)


def test_both_backends_begin_a_target_with_the_tokenizers_padding_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T5 whose tokenizer has RoBERTa's special tokens: transformers shifts labels as the batches are shifted."""
    torch = pytest.importorskip("torch", reason="the other side")
    from jaxllm.torch_backend.model import build_model
    from jaxllm.training import prepare_run

    monkeypatch.setitem(MODELS, "t5", {**MODELS["t5"], "num_decoder_layers": 2})
    described = config("t5", "seq2seq", tmp_path)
    tokenizer = described.data.tokenizer.model_copy(update={"special_tokens": "roberta", "vocab_size": 320})
    described = described.model_copy(update={"data": described.data.model_copy(update={"tokenizer": tokenizer})})
    run, data = prepare_run(described, progress=False)
    reference = build_model(run.model, "eager", torch.float32, torch.device("cpu"))
    batch = BatchPipeline(data, described, "train").batch(0)
    labels = torch.from_numpy(np.where(batch.segments > 0, batch.targets, -100)).long()
    shifted = reference._shift_right(labels).numpy()  # how it feeds a decoder
    assert (batch.inputs[:, 0] == 1).all()
    np.testing.assert_array_equal(batch.inputs[batch.segments > 0], shifted[batch.segments > 0])
    last = batch.targets[np.arange(batch.rows), batch.segments.sum(axis=1) - 1]
    assert (last == reference.config.eos_token_id).all()


def test_a_tokenizer_that_ends_no_target_is_refused(tmp_path: Path) -> None:
    from jaxllm.training import prepare_run

    described = config("t5", "seq2seq", tmp_path)
    tokenizer = described.data.tokenizer.model_copy(update={"special_tokens": "gpt2"})
    described = described.model_copy(update={"data": described.data.model_copy(update={"tokenizer": tokenizer})})
    _, data = prepare_run(described, progress=False)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: puts no end-of-text token behind a text"):
        BatchPipeline(data, described, "train")


@pytest.mark.parametrize("padded", ["right", "left", "inside"])
def test_a_row_is_judged_by_the_token_that_transformers_takes(padded: str) -> None:
    """JAX and transformers pass over padding at either end, and over padding tokens that a text ends with."""
    torch = pytest.importorskip("torch", reason="the other side")
    from jaxllm.jax_backend.model.head import last_token

    model = resolve_model(ModelConfig.model_validate(tiny("llama")), OWN, task=CLASSIFIER)
    random = np.random.default_rng(0)
    tokens, segments = random.integers(2, 9, (6, 7)).astype(np.int32), np.ones((6, 7), np.int32)
    for row in range(6):
        empty = {"right": slice(7 - row, 7), "left": slice(0, row), "inside": slice(0, 0)}[padded]
        segments[row, empty] = 0
    if padded == "inside":
        tokens[::2, 5:] = 1
    tokens[segments == 0] = 1
    found = last_token(model.spec.head, tokens, segments)
    kept = torch.from_numpy(tokens) != 1
    wanted = (torch.arange(7) * kept.int()).argmax(-1)  # transformers.modeling_layers.GenericForSequenceClassification
    np.testing.assert_array_equal(np.asarray(found), wanted.numpy())
