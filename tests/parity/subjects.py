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


WELL_CONDITIONED = {"initializer_range": 0.1}
"""For fp32, which asks how exactly a backend computes, not what.

With the weights above, scores of attention reach 18 (their standard deviation is 3), the softmax behind them takes the rounding
of a query up by that factor and its derivative by as much again: a relative change of 2^-24 of the queries of layer 0 changes
Qwen2's gradient of the embedding by 55 times that, of its values by 7 times, of anything in layer 1 by 3 times at most.  Either
backend is then as far from its own float64 (1e-5) as from the other.  With these weights scores reach 2 and no gain is above 4.
"""


def subject(family: str, cache: Path, **changes: Any) -> Subject:
    """The run of a family on the paragraphs of a module of Python's.  changes: of keys of its model."""
    config = RunConfig.model_validate(
        {
            "name": f"parity-{family}",
            "model": {**MODELS[family], **changes},
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
