"""What DeepSpeed cannot combine is refused by name, by the same table everywhere, and without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxllm.backend import create_backend
from jaxllm.config.objective import CausalLmObjective, MaskedLmObjective
from jaxllm.errors import ConfigError
from jaxllm.torch_backend.combinations import REFUSALS, Refusal, check_combinations
from tests.distributed.deepspeed_cases import make_run

# One run for every row of the table, by what it changes: family, precision, parallel, and keys of `deepspeed`.
_ASKED: dict[str, dict[str, Any]] = {
    "expert above 1": {"parallel": {"expert": 2}},
    "context above 1 with another objective than causal-lm": {
        "parallel": {"context": 2},
        "objective": MaskedLmObjective(kind="masked-lm"),
    },
    "zero_stage above 0 with precision fp64": {"precision": "fp64", "zero_stage": 1},
    "torch_compile with precision fp64": {"precision": "fp64", "torch_compile": True},
    "fsdp above 1 with zero_stage 0": {"parallel": {"fsdp": 2}},
    "offload_optimizer with zero_stage 0": {"offload_optimizer": "cpu"},
    "offload_param with zero_stage below 3": {"zero_stage": 2, "offload_param": "cpu"},
    "loss_chunk in tokens with tensor above 1 and a head of its own": {"parallel": {"tensor": 2}, "loss_chunk": 8},
    "torch_compile with tensor above 1": {"parallel": {"tensor": 2}, "torch_compile": True},
    "torch_compile with context above 1": {"parallel": {"context": 2}, "torch_compile": True},
    "liger with precision fp64": {"precision": "fp64", "liger": True},
    "liger with a family that it has no kernels for": {"family": "gpt2", "liger": True},
    "liger with an activation that it has no kernel for": {"model": {"hidden_act": "gelu"}, "liger": True},
    "liger with torch_compile": {"torch_compile": True, "liger": True},
    "liger with tensor or context above 1": {"parallel": {"tensor": 2}, "liger": True},
    "tensor above 1 with a family that AutoTP does not split": {"family": "gpt2-heads", "parallel": {"tensor": 2}},
    "tensor that does not divide the attention heads and the key/value heads": {"parallel": {"tensor": 4}},
    "context that does not divide the attention heads (of each tensor shard)": {"parallel": {"context": 3}},
    "context that neither divides the key/value heads (of each tensor shard) nor is a multiple of them": {
        "parallel": {"context": 3},
        "model": {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 24, "head_dim": 4},
    },
    "context that does not divide data.sequence_length": {
        "parallel": {"context": 5},
        "model": {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 4},
    },
}


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.combination)
def test_every_row_is_refused_by_name(row: Refusal) -> None:
    asked = {"family": "llama-heads", **_ASKED[row.combination]}
    objective = asked.pop("objective", CausalLmObjective())
    run = make_run(asked.pop("family"), **asked)
    config = run.config.model_copy(update={"objective": objective})
    with pytest.raises(ConfigError) as refused:
        check_combinations(config, run.model, None)
    assert refused.value.key == row.key
    assert row.combination in refused.value.message
    assert refused.value.message.endswith(row.remedy)


def test_the_documentation_shows_the_table() -> None:
    page = (Path(__file__).parents[3] / "docs" / "deepspeed_backend.md").read_text()
    for row in REFUSALS:
        assert f"| {row.combination} | {row.reason} | {row.remedy} |" in page


@pytest.mark.parametrize(
    ("parallel", "stage", "world", "key", "words"),
    [
        ({"data": 2}, 0, 4, "parallel.data", "--processes 2"),
        ({"data": 2, "tensor": 2}, 0, 2, "parallel", "4 devices"),
        ({"data": 1, "context": 2}, 0, 4, "parallel.data", "--processes 2"),
        ({"data": 4}, 0, 2, "parallel", "4 devices"),
        ({"fsdp": 4}, 3, 2, "parallel.data", "not a multiple of 4"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(parallel: dict[str, int], stage: int, world: int, key: str, words: str) -> None:
    run = make_run("llama-heads", parallel=parallel, zero_stage=stage)
    with pytest.raises(ConfigError) as refused:
        check_combinations(run.config, run.model, world)
    assert refused.value.key == key
    assert words in refused.value.message


@pytest.mark.parametrize(
    ("parallel", "stage", "world"),
    [
        ({}, 0, 3),
        ({"data": 2}, 0, 2),
        ({"fsdp": 2}, 1, 4),
        ({"data": 2, "fsdp": 2}, 3, 4),
        ({"tensor": 2}, 3, 8),
        ({"tensor": 2, "context": 2, "fsdp": 2}, 2, 8),
        ({"context": 4}, 0, 4),
    ],
)
def test_a_mesh_that_can_be_is_accepted(parallel: dict[str, int], stage: int, world: int) -> None:
    run = make_run("llama-heads", parallel=parallel, zero_stage=stage)
    check_combinations(run.config, run.model, world)


def test_liger_is_refused_on_context_too() -> None:
    run = make_run("llama-heads", parallel={"context": 2}, liger=True)
    with pytest.raises(ConfigError, match="liger with tensor or context above 1"):
        check_combinations(run.config, run.model, None)


def test_the_backend_asks_the_table_before_anything_else() -> None:
    with pytest.raises(ConfigError) as refused:
        create_backend("deepspeed").start(make_run(precision="fp64", zero_stage=2), None)
    assert refused.value.key == "deepspeed.zero_stage"


def test_the_table_needs_no_torch() -> None:
    code = (
        "import sys; import jaxllm.torch_backend.combinations; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
