"""Labelled and paired examples: from every kind of file to rows, and one sentence for everything that is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxllm.config import RunConfig
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.data.prepare import prepare
from jaxllm.errors import ConfigError, DataError, JaxllmError

SENTENCES = ["a fine film", "a dull film, and a long one", "fine acting", "dull, dull, dull", "the film is fine", "so long"]
LABELS = ["good", "bad", "good", "bad", "good", "bad"]
WORDS = {"kind": "token-classification", "num_labels": 3}
CLASSIFY = {"kind": "sequence-classification", "labels": ["bad", "good"]}


def make(tmp_path: Path, source: dict[str, Any], objective: dict[str, Any], **data: Any) -> RunConfig:
    tokenizer = data.pop("tokenizer", {"train": "wordpiece", "vocab_size": 200})
    return RunConfig.model_validate(
        {
            "name": "examples",
            "model": {"family": "bert"},
            "objective": objective,
            "data": {
                "source": source,
                "validation_fraction": 0.2,
                "tokenizer": tokenizer,
                "sequence_length": 24,
                "packing": "none",
                "cache_dir": str(tmp_path / "cache"),
                **data,
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 1, "global_batch": 2},
        }
    )


def jsonl(tmp_path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "jsonl", "files": str(file), "label_field": "label"}


def rows_of(config: RunConfig) -> list[tuple[str, list[float], list[int]]]:
    """Decoded text, targets and token types of every row of both splits, sorted."""
    data = prepare(config, progress=False)
    found = []
    for split in ("train", "validation"):
        with BatchPipeline(data, config, split) as pipeline:
            count = -(-pipeline.sequences // config.training.global_batch)
            for number in range(count):
                batch = pipeline.batch(number)
                for row in range(batch.rows):
                    real = batch.segments[row] > 0
                    if real.any():
                        tokens = batch.inputs[row][real].tolist()
                        assert batch.token_types is not None
                        types = batch.token_types[row][real].tolist()
                        found.append((data.tokenizer.decode(tokens), batch.targets[row].tolist(), types))
    return sorted(found)


def test_every_kind_of_table_gives_the_same_rows(tmp_path: Path) -> None:
    pairs = list(zip(SENTENCES, LABELS, strict=True))
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in pairs))
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in pairs))
    pq.write_table(
        pa.table({"text": SENTENCES, "label": [LABELS.index(label) ^ 1 for label in LABELS]}), tmp_path / "a.parquet"
    )
    table = [{"text": text, "label": label} for text, label in pairs]
    sources = [jsonl(tmp_path, table)]
    sources += [
        {"kind": kind, "files": str(tmp_path / f"a.{kind}"), "label_field": "label"} for kind in ("csv", "tsv", "parquet")
    ]
    first, *others = (rows_of(make(tmp_path, source, CLASSIFY)) for source in sources)
    assert all(other == first for other in others)
    texts = {text: targets for text, targets, _ in first}
    assert texts["[CLS] a fine film [SEP]"] == [1]
    assert texts["[CLS] so long [SEP]"] == [0]


def test_a_quotation_mark_of_a_tsv_is_a_character(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text("text\tlabel\n" + '"a b c\tgood\nc b a" \tbad\n' * 4)
    source = {"kind": "tsv", "files": str(file), "label_field": "label"}
    texts = {text for text, _, _ in rows_of(make(tmp_path, source, CLASSIFY))}
    assert texts == {'[CLS] " a b c [SEP]', '[CLS] c b a " [SEP]'}


def test_pairs_have_types_and_the_longer_text_is_cut_first(tmp_path: Path) -> None:
    rows = [{"text": "a b", "other": "c d e f g h i j k l m n o p q r s t u v w x y z", "label": 0}] * 3
    source = jsonl(tmp_path, rows) | {"second_field": "other"}
    with pytest.raises(DataError, match=r"rows.jsonl:\d .and 1 more.: the pair of texts has 29 tokens.*sequence_length is 24"):
        rows_of(make(tmp_path, source, CLASSIFY))
    text, targets, types = rows_of(make(tmp_path, source, CLASSIFY, truncate=True))[0]
    assert text == "[CLS] a b [SEP] c d e f g h i j k l m n o p q r s t u [SEP]"
    assert targets == [0]
    assert types == [0] * 4 + [1] * 20


def test_labels_of_every_problem(tmp_path: Path) -> None:
    multi = {"kind": "sequence-classification", "labels": ["x", "y", "z"], "problem_type": "multi_label_classification"}
    rows = [{"text": "a b", "label": ["z", 0]}, {"text": "b c", "label": []}, {"text": "c d", "label": ["y"]}]
    found = rows_of(make(tmp_path, jsonl(tmp_path, rows), multi))
    assert sorted(targets for _, targets, _ in found) == [[0, 0, 0], [0, 1, 0], [1, 0, 1]]
    regression = {"kind": "sequence-classification", "problem_type": "regression"}
    rows = [{"text": "a b", "label": 0.5}, {"text": "c d", "label": "-1"}, {"text": "b c", "label": 2}]
    found = rows_of(make(tmp_path, jsonl(tmp_path, rows), regression))
    assert sorted(targets for _, targets, _ in found) == [[-1.0], [0.5], [2.0]]


def test_a_word_has_its_label_at_its_first_token(tmp_path: Path) -> None:
    rows = [{"text": ["unbelievable", "film"], "label": ["B", "O"]}] * 4
    config = make(tmp_path, jsonl(tmp_path, rows), {"kind": "token-classification", "labels": ["O", "B"]})
    data = prepare(config, progress=False)
    with BatchPipeline(data, config, "train") as pipeline:
        batch = pipeline.batch(0)
    tokens = batch.inputs[0][batch.segments[0] > 0].tolist()
    pieces = [data.tokenizer.backend.id_to_token(token) for token in tokens]
    second = (
        pieces.index("film") if "film" in pieces else next(n for n, piece in enumerate(pieces) if n > 1 and piece[0] != "#")
    )
    assert batch.targets[0, 1] == 1
    assert np.flatnonzero(batch.weights[0]).tolist() == [1, second]


@pytest.mark.parametrize(
    ("objective", "row", "sentence"),
    [
        (CLASSIFY, {"text": "x", "label": 2}, "has the label 2 in 'label', outside 0 to 1"),
        (CLASSIFY, {"text": "x", "label": "godo"}, "has the label 'godo' in 'label', which is unknown; did you mean 'good'?"),
        (CLASSIFY, {"text": "x", "label": "-1"}, "has the label '-1' in 'label', which is unknown (labels: bad, good)"),
        (CLASSIFY, {"text": "x", "label": True}, "has bool in 'label', not a label"),
        (CLASSIFY, {"text": " ", "label": 1}, "has no text in 'text'"),
        (
            WORDS,
            {"text": ["a", "b"], "label": [1]},
            "has 2 words but 1 labels in 'label'",
        ),
        (
            {"kind": "token-classification", "num_labels": 3},
            {"text": ["a", ""], "label": [1, 2]},
            "has no text in word 2 of 'text'",
        ),
        (
            {"kind": "sequence-classification", "problem_type": "regression"},
            {"text": "x", "label": "much"},
            "has 'much' in 'label', which is not a number",
        ),
    ],
)
def test_a_bad_row_is_one_sentence(tmp_path: Path, objective: dict[str, Any], row: dict[str, Any], sentence: str) -> None:
    good = {"text": ["a", "b"] if objective["kind"].startswith("token") else "fine", "label": [1, 1]}
    good["label"] = good["label"] if objective["kind"].startswith("token") else 1
    source = jsonl(tmp_path, [good, row, good])
    with pytest.raises(DataError) as caught:
        prepare(make(tmp_path, source, objective), progress=False)
    assert str(caught.value).startswith(f"{source['files']}:2 {sentence}"), str(caught.value)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"objective": {"kind": "causal-lm"}}, "data.source.label_field"),
        ({"source": {"label_field": None}}, "data.source.label_field"),
        ({"source": {"target_field": "text"}}, "data.source.target_field"),
        ({"data": {"packing": "concatenate"}}, "data.packing"),
        ({"data": {"append_eos": True}}, "data.append_eos"),
        ({"data": {"target_length": 8}}, "data.target_length"),
        ({"data": {"cross_document_attention": True}}, "data.cross_document_attention"),
        ({"source": {"kind": "text", "label_field": None}}, "data.source.kind"),
    ],
)
def test_a_key_that_means_nothing_is_named(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    source = jsonl(tmp_path, [{"text": "x", "label": 0}]) | change.get("source", {})
    source = {name: value for name, value in source.items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        prepare(make(tmp_path, source, change.get("objective", CLASSIFY), **change.get("data", {})), progress=False)
    assert caught.value.key == key


def test_lines_of_two_files_belong_together(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "a.de").write_text("eins\n")
    source = {"kind": "parallel-text", "files": str(tmp_path / "a.en"), "target_files": str(tmp_path / "a.de")}
    with pytest.raises(JaxllmError, match=r"a\.de ends before line 2 of .*a\.en"):
        prepare(make(tmp_path, source, {"kind": "seq2seq"}), progress=False)
    (tmp_path / "a.de").write_text("eins\n\n")
    with pytest.raises(JaxllmError, match=r"a\.de:2 has no text"):
        prepare(make(tmp_path, source, {"kind": "seq2seq"}), progress=False)
