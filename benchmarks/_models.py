"""Sizes of Llama models, as keys of Hugging Face's config."""

from __future__ import annotations


def llama_sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, int]:
    """hidden_size, intermediate_size, layers, attention heads, key/value heads and entries of the vocabulary."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }
