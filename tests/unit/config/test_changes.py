"""What defines a run, compared when it is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxllm.config import changed_keys, write_yaml
from jaxllm.config.document import parse_document
from tests.unit.config.example import EXAMPLE, load


def dump(folder: Path, *overrides: str) -> dict[str, Any]:
    return load(folder, EXAMPLE, *overrides).config.model_dump(mode="json", by_alias=True)


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("seed=2", {"seed": (1, 2)}),
        ("model.hidden_size=128", {"model.hidden_size": (64, 128)}),
        ("model.head_dim=8", {"model.head_dim": (None, 8)}),
        ("data.sequence_length=64", {"data.sequence_length": (32, 64)}),
        ("data.source.files=[a.jsonl]", {"data.source.files": (["a.jsonl", "b.jsonl"], ["a.jsonl"])}),
        ("data.packing=none", {"data.packing": ("concatenate", "none")}),
        ("optimizer.betas=[0.9, 0.99]", {"optimizer.betas": ([0.9, 0.95], [0.9, 0.99])}),
        ("schedule.kind=linear", {"schedule.kind": ("cosine", "linear")}),
        ("training.global_batch=16", {"training.global_batch": (8, 16)}),
        ("training.precision=bf16", {"training.precision": ("fp32", "bf16")}),
        ("data.tokenizer={from: x}", {
            "data.tokenizer.train": ("bpe", None), "data.tokenizer.vocab_size": (300, None), "data.tokenizer.from": (None, "x")
        }),
    ],
)  # fmt: skip
def test_what_defines_the_run(tmp_path: Path, override: str, changes: dict[str, Any]) -> None:
    assert changed_keys(dump(tmp_path), dump(tmp_path, override)) == changes


@pytest.mark.parametrize(
    "override",
    [
        "name=other", "output_dir=elsewhere", "backend=deepspeed", "parallel.fsdp=4", "training.micro_batch=2",
        "jax.remat=full", "deepspeed.zero_stage=3", "logging.every=1", "checkpoint.every=1", "evaluation.every=1",
        "sample.prompt=x", "data.cache_dir=/x", "data.workers=2", "data.prefetch=0",
    ],
)  # fmt: skip
def test_what_does_not(tmp_path: Path, override: str) -> None:
    assert changed_keys(dump(tmp_path), dump(tmp_path, override)) == {}


def test_a_config_read_back_from_disk_is_unchanged(tmp_path: Path) -> None:
    written = dump(tmp_path)
    assert changed_keys(parse_document(write_yaml(written), "x").data, written) == {}
