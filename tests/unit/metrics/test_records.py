from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from jaxllm.metrics.records import TrainRecord, ValidationRecord

TRAIN = TrainRecord(7, 2.5, 1e-3, 0.5, 1000.0, 0.25, 0.4, 2**30, 4096, 12.0, 100.0)


def test_train_record_has_the_promised_keys() -> None:
    assert TRAIN.to_json() == {
        "step": 7,
        "split": "train",
        "loss": 2.5,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5,
        "tokens_per_second": 1000.0,
        "model_tflops": 0.25,
        "mfu": 0.4,
        "memory_bytes": 2**30,
        "tokens": 4096,
        "seconds": 12.0,
    }


def test_unknown_and_non_finite_values_become_null_and_the_line_stays_json() -> None:
    record = replace(TRAIN, loss=math.nan, gradient_norm=math.inf, tokens_per_second=None, mfu=None, memory_bytes=None)
    line = json.loads(json.dumps(record.to_json(), allow_nan=False))
    assert [key for key, value in line.items() if value is None] == [
        "loss",
        "gradient_norm",
        "tokens_per_second",
        "mfu",
        "memory_bytes",
    ]


def test_validation_record_from_sums() -> None:
    # A model that gives every one of 256 bytes the same probability needs 8 bits per byte, whatever the tokens are.
    tokens, bytes_per_token = 500, 4.0
    loss = bytes_per_token * math.log(256)
    record = ValidationRecord.from_sums(100, loss * tokens, tokens, bytes_per_token, 1.5)
    assert record.loss == pytest.approx(loss)
    assert record.bits_per_byte == pytest.approx(8.0)
    assert record.perplexity == pytest.approx(256.0**4)
    assert record.to_json()["split"] == "validation"
    assert set(record.to_json()) >= {"step", "split", "loss", "perplexity", "bits_per_byte", "target_tokens", "seconds"}


def test_validation_record_without_text_size_without_tokens_and_with_a_huge_loss() -> None:
    assert ValidationRecord.from_sums(1, 10.0, 5, None, 0.1).bits_per_byte is None
    assert ValidationRecord.from_sums(1, 0.0, 0, 3.0, 0.1).to_json()["loss"] is None
    huge = ValidationRecord.from_sums(1, 5000.0, 1, 3.0, 0.1)
    assert huge.perplexity == math.inf
    assert huge.to_json()["perplexity"] is None
