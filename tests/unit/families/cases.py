"""Models that the tests of the families go over: every option that changes a weight or a number, at sizes all different."""

from __future__ import annotations

from typing import Any

from tests.tiny import TINY, tiny

LLAMA: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 103,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "family": "gpt2",
    "vocab_size": 103,
    "n_positions": 64,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
}

CASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
    "llama-mha": {**LLAMA, "num_key_value_heads": None},
    "llama-mqa": {**LLAMA, "num_key_value_heads": 1},
    "llama-head-dim": {**LLAMA, "head_dim": 10},
    "llama-biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama-padding": {**LLAMA, "pad_token_id": 7},
    "gpt2": GPT2,
    "gpt2-untied": {**GPT2, "tie_word_embeddings": False},
    "gpt2-inner": {**GPT2, "n_inner": 100},
    **{
        family: {"family": family, **keys, "vocab_size": 103}
        for family, keys in TINY.items()
        if family not in ("llama", "gpt2")
    },
    "mistral-whole": {"family": "mistral", **TINY["mistral"], "vocab_size": 103, "sliding_window": None, "head_dim": None},
    "qwen2-untied": {"family": "qwen2", **TINY["qwen2"], "vocab_size": 103, "tie_word_embeddings": False},
    "phi3-tied": {"family": "phi3", **TINY["phi3"], "vocab_size": 103, "tie_word_embeddings": True},
    "qwen3_moe-plain": {
        **tiny("qwen3_moe", vocab_size=103),
        "head_dim": None,
        "norm_topk_prob": False,
        "use_sliding_window": False,
    },
    "olmo2-mha": {"family": "olmo2", **TINY["olmo2"], "vocab_size": 103, "num_key_value_heads": 4, "attention_bias": False},
}
