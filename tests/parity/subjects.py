"""Tiny runs that parity is tried on: one per family, every feature of the family switched on."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from jaxllm.config import RunConfig
from jaxllm.parity.subject import Subject, examine
from tests.tiny import TINY, tiny

MODELS: dict[str, dict[str, Any]] = {family: tiny(family, initializer_range=0.3) for family in TINY} | {
    "llama": {
        "family": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.3,
        "max_position_embeddings": 96,
    },
    "gpt2": {
        "family": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 96,
        "activation_function": "gelu",
        "initializer_range": 0.3,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}
"""Weights are large enough that a mistake anywhere shows in the logits.  GPT-2 and Llama are plainer than in the table of tiny
models, for the faults that are planted in them."""


def subject(family: str, cache: Path) -> Subject:
    """The run of a family on the paragraphs of a module of Python's."""
    config = RunConfig.model_validate(
        {
            "name": f"parity-{family}",
            "model": MODELS[family],
            "data": {
                # Short documents, so that rows hold several of them.
                "source": {"kind": "text", "files": inspect.getsourcefile(inspect), "document": "paragraph"},
                "tokenizer": {"train": "bpe", "vocab_size": 320},
                "sequence_length": 64,
                "cache_dir": str(cache),
            },
            "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
            "training": {"steps": 20, "global_batch": 4},
        }
    )
    return examine(config, cache)
