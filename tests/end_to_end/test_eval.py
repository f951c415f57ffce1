"""Train a classifier, evaluate it on both backends, export it, and evaluate the folder; transformers agrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jaxllm.cli.main import main
from jaxllm.config import write_yaml
from tests.parity.tasks import config

pytest.importorskip("torch", reason="the other backend")


def run(*arguments: str) -> str:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_classifier_from_training_to_evaluation(tmp_path: Path) -> None:
    described = config("bert", "single", tmp_path, output_dir=str(tmp_path), name="small", sample={"max_new_tokens": 0})
    document: dict[str, Any] = described.model_dump(mode="json", by_alias=True, exclude_none=True)
    document["model"] = {**document["model"], "family": "bert"}
    (tmp_path / "run.yaml").write_text(write_yaml(document))
    run("train", str(tmp_path / "run.yaml"))
    folder = tmp_path / "small"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = metrics[-1]
    assert last["split"] == "validation"
    measured = {}
    for backend in ("jax", "deepspeed"):
        out = tmp_path / f"{backend}.json"
        said = run("eval", str(folder), "--backend", backend, "--json", str(out))
        assert "confusion matrix" in said
        measured[backend] = json.loads(out.read_text())
    assert measured["jax"]["measures"] == measured["deepspeed"]["measures"]
    assert measured["jax"]["loss"] == pytest.approx(measured["deepspeed"]["loss"], rel=1e-6)
    assert measured["jax"]["measures"]["values"]["accuracy"] == pytest.approx(last["accuracy"])
    assert (folder / "confusion.png").exists()

    run("export", str(folder), str(tmp_path / "exported"))
    data = ["--data", str(tmp_path / "single.jsonl"), "--field", "second=second", "--field", "label=label"]
    run("eval", str(tmp_path / "exported"), *data, "--json", str(tmp_path / "whole.json"))
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert whole["examples"] == 120
    assert whole["measures"]["labels"] == ["short", "middling", "long"]
    assert _transformers_accuracy(tmp_path) == pytest.approx(whole["measures"]["values"]["accuracy"])


def _transformers_accuracy(folder: Path) -> float:
    """What a user of transformers measures with the exported folder and its tokenizer."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [json.loads(line) for line in (folder / "single.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "exported").eval()
    texts = tokenizer([row["text"] for row in rows], [row["second"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**texts).logits.argmax(-1).tolist()
    names = [model.config.id2label[number] for number in range(3)]
    wanted = [row["label"] if isinstance(row["label"], int) else names.index(row["label"]) for row in rows]
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(rows)


def test_what_cannot_be_evaluated_is_one_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["eval", str(tmp_path)])
    assert done.exit_code == 1
    assert "neither a run folder" in done.output
