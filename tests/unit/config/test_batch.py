"""The batch arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.config import BatchPlan, RunConfig, data_parallel, resolve_batch, total_steps
from jaxllm.config.schema import ParallelConfig
from jaxllm.errors import ConfigError
from tests.unit.config.example import EXAMPLE, load


def with_batch(folder: Path, global_batch: int, micro_batch: int | None = None) -> RunConfig:
    micro = "null" if micro_batch is None else micro_batch
    return load(folder, EXAMPLE, f"training.global_batch={global_batch}", f"training.micro_batch={micro}").config


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "groups", "plan"),
    [
        (16, None, 1, BatchPlan(16, 1)),
        (16, None, 8, BatchPlan(2, 1)),
        (16, 1, 4, BatchPlan(1, 4)),
        (16, 4, 4, BatchPlan(4, 1)),
        (48, 2, 3, BatchPlan(2, 8)),
    ],
)
def test_plan(tmp_path: Path, global_batch: int, micro_batch: int | None, groups: int, plan: BatchPlan) -> None:
    assert resolve_batch(with_batch(tmp_path, global_batch, micro_batch), groups) == plan


@given(st.integers(1, 300), st.none() | st.integers(1, 20), st.integers(1, 20))
def test_plan_multiplies_out_or_is_refused_for_a_reason(whole: int, micro: int | None, groups: int) -> None:
    config = RunConfig.model_validate(
        {
            "name": "x",
            "model": {"family": "llama"},
            "data": {"tokenizer": {"train": "bpe", "vocab_size": 300}, "sequence_length": 8},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 1, "global_batch": whole, "micro_batch": micro},
        }
    )
    if whole % (groups * (micro or 1)) == 0:
        plan = resolve_batch(config, groups)
        assert plan.micro_batch * plan.accumulation * groups == whole
        assert micro in (None, plan.micro_batch)
    else:
        with pytest.raises(ConfigError):
            resolve_batch(config, groups)


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "groups", "sentence"),
    [
        (16, None, 3, "training.global_batch: 16 sequences cannot be split evenly over 3 data-parallel devices; use 15 or 18"),
        (2, None, 3, "training.global_batch: 2 sequences cannot be split evenly over 3 data-parallel devices; use 3"),
        (
            24,
            5,
            2,
            (
                "training.micro_batch: global_batch 24 over 2 data-parallel devices leaves 12 sequences for each, which is not "
                "a multiple of micro_batch 5; use a micro_batch of 1, 2, 3, 4, 6 or 12, or a global_batch of 20 or 30"
            ),
        ),
    ],
)
def test_indivisible(tmp_path: Path, global_batch: int, micro_batch: int | None, groups: int, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_batch(with_batch(tmp_path, global_batch, micro_batch), groups)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("parallel", "devices", "groups"),
    [
        ({}, 1, 1),
        ({}, 8, 8),
        ({"data": 4}, 8, 4),
        ({"fsdp": 4}, 8, 8),
        ({"fsdp": 2, "tensor": 2}, 8, 4),
        ({"data": 1, "fsdp": 2, "tensor": 2, "context": 2}, 8, 2),
    ],
)
def test_data_parallel(parallel: dict[str, Any], devices: int, groups: int) -> None:
    assert data_parallel(ParallelConfig(**parallel), devices) == groups


def test_mesh_larger_than_the_devices() -> None:
    with pytest.raises(ConfigError) as caught:
        data_parallel(ParallelConfig(data=4, fsdp=4), 8)
    assert str(caught.value) == (
        "parallel: the mesh of data 4, fsdp 4, tensor 1, context 1, expert 1 needs 16 devices, but there are 8"
    )


def test_mesh_that_does_not_come_out_even() -> None:
    with pytest.raises(ConfigError) as caught:
        data_parallel(ParallelConfig(tensor=3), 8)
    assert str(caught.value) == (
        "parallel.data: -1 takes every device that the other axes leave, but 8 are not a multiple of 3 "
        "(fsdp 1, tensor 3, context 1, expert 1)"
    )


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (256, 1), (257, 2), (2560, 10), (2561, 11)])
def test_tokens_are_rounded_up_to_whole_steps(tmp_path: Path, tokens: int, steps: int) -> None:
    config = load(tmp_path, EXAMPLE, "training.steps=null", f"training.tokens={tokens}").config
    assert total_steps(config) == steps


def test_steps_are_taken_as_they_are(tmp_path: Path) -> None:
    assert total_steps(load(tmp_path).config) == 10
