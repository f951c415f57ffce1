"""Rotary frequencies of every kind against transformers' own functions, in float32 to the last bits and in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxllm.families.rope import inverse_frequencies
from jaxllm.families.rope_keys import RopeParameters, read_rope

torch = pytest.importorskip("torch", reason="needs the deepspeed extra")

from transformers import LlamaConfig  # noqa: E402 - it imports torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

from jaxllm.torch_backend.float64 import true_float64  # noqa: E402

HEAD_DIM, POSITIONS = 24, 256
LONG = {"short_factor": [1.0 + 0.1 * i for i in range(12)], "long_factor": [1.0 + 2.0 * i for i in range(12)]}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, **LLAMA3},
    "llama3, default positions": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, every key": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False,
                        "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.3},
    "yarn, attention factor": {"rope_type": "yarn", "factor": 40.0, "attention_factor": 1.5},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 64, **LONG},
    "longrope, factor": {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 16.0, **LONG},
    "longrope, attention factor": {"rope_type": "longrope", "original_max_position_embeddings": 64,
                                   "attention_factor": 1.25, **LONG},
}  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("length", [32, 64, 65, 256, 700])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers(kind: str, length: int, precision: str) -> None:
    config = LlamaConfig(
        head_dim=HEAD_DIM, max_position_embeddings=POSITIONS, rope_parameters={**KINDS[kind], "rope_theta": 5e5}
    )
    initialise = ROPE_INIT_FUNCTIONS[KINDS[kind]["rope_type"]]
    if precision == "float64":
        with true_float64():
            wanted, factor = initialise(config, torch.device("cpu"), seq_len=length)
    else:
        wanted, factor = initialise(config, torch.device("cpu"), seq_len=length)
    keys: dict[str, Any] = {"rope_parameters": KINDS[kind], "rope_theta": 5e5}
    read_rope(keys, 1e4, POSITIONS)
    spec = RopeParameters.model_validate(keys["rope_parameters"]).spec(POSITIONS)
    found = inverse_frequencies(spec, HEAD_DIM, length, np.dtype(precision))
    assert found.dtype == np.dtype(precision)
    assert spec.attention_factor == pytest.approx(factor, rel=1e-15)
    if precision == "float64":
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-14)
    else:
        np.testing.assert_array_max_ulp(found, wanted.numpy(), maxulp=3)


@pytest.mark.parametrize("length", [64, 65])
def test_longrope_changes_its_factors_beyond_the_original_length(length: int) -> None:
    spec = RopeParameters.model_validate(KINDS["longrope"]).spec(POSITIONS)
    plain = inverse_frequencies(RopeParameters().spec(POSITIONS), HEAD_DIM, length, np.dtype(np.float64))
    factors = plain / inverse_frequencies(spec, HEAD_DIM, length, np.dtype(np.float64))
    np.testing.assert_allclose(factors, LONG["short_factor" if length == 64 else "long_factor"], rtol=1e-12)


def test_older_spellings_are_read_and_null_is_left_out() -> None:
    keys: dict[str, Any] = {"rope_scaling": {"type": "linear", "factor": 2, "attention_factor": None}, "rope_theta": 1e5}
    read_rope(keys, 1e4, POSITIONS)
    parameters = RopeParameters.model_validate(keys["rope_parameters"])
    assert parameters.model_dump() == {"rope_theta": 1e5, "rope_type": "linear", "factor": 2.0}
