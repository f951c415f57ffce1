"""Compiled steps, each compiled once for all tests that look at it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest

from jaxllm.config import RunConfig
from jaxllm.planning.tpu.study import Study, study
from jaxllm.planning.tpu.topology import parse_topology

SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "family": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "gpt2": {"family": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 2, "vocab_size": 512, "n_positions": 128},
}

_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # which takes the compiler long
OTHERS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "model": {**MODELS["llama"], "family": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
        "parallel": {"fsdp": 2, "expert": 2},
    },
    "bert": {
        "model": {
            "family": "bert",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 512,
            **_NO_DROPOUT,
        },
        "objective": {"kind": "masked-lm"},
    },
    "t5": {
        "model": {
            "family": "t5",
            "vocab_size": 512,
            "d_model": 128,
            "d_ff": 256,
            "num_layers": 2,
            "num_heads": 2,
            "dropout_rate": 0.0,
        },
        "objective": {"kind": "seq2seq"},
        "data": {"tokenizer": {"train": "bpe", "vocab_size": 512}, "sequence_length": 256, "target_length": 128},
    },
    "labels": {
        "model": {
            "family": "roberta",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 512,
            "max_position_embeddings": 130,
            **_NO_DROPOUT,
        },
        "objective": {"kind": "sequence-classification", "num_labels": 3},
    },
}
"""Sections of runs that are not a decoder's language model."""


def make_config(family: str, **sections: Any) -> RunConfig:
    """A small bf16 run over fsdp 2 x tensor 2 and what is left."""
    model = MODELS.get(family)
    if family == "gpt2":
        model = {**MODELS[family], "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    whole = {
        "name": family,
        "model": model,
        "data": {"tokenizer": {"train": "bpe", "vocab_size": 512}, "sequence_length": 128},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 1, "global_batch": 16, "precision": "bf16"},
        "parallel": {"fsdp": 2, "tensor": 2},
        "jax": {"remat": "full"},
        **OTHERS.get(family, {}),
        **sections,
    }
    return RunConfig.model_validate(whole)


@pytest.fixture(scope="session", autouse=True)
def _needs_libtpu() -> None:
    if find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (pip install 'jaxllm[dev]')")


@pytest.fixture(scope="session")
def compiled() -> Callable[[str, str], Study]:
    """`compiled(family, generation)`: the study of that step.  All are compiled two at a time, from the first call on."""
    pool = ThreadPoolExecutor(2)

    @cache
    def futures() -> dict[tuple[str, str], Future[Study]]:
        return {
            (family, generation): pool.submit(study, make_config(family), parse_topology(topology))
            for generation, topology in SMALLEST.items()
            for family in MODELS
        }

    return lambda family, generation: futures()[family, generation].result()
