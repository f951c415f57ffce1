"""The one table of families that tests go over: tiny models with every feature of their family switched on.

A window is shorter than any test's sequence, rotary positions are stretched past their original length, keys and values are
grouped, heads are not hidden_size / num_attention_heads where the family allows it.  A new family is one line here.
"""

from __future__ import annotations

from typing import Any

_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LONG = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 2.5, 6.0]}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "mscale": 0.7, "mscale_all_dim": 0.4}
_ALTERNATING = ["sliding_attention", "full_attention"]
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": None, "eos_token_id": None, **_NO_DROPOUT},
    "llama": {**_DECODER, "attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "llama3", **_LLAMA3}},
    "mistral": {**_DECODER, "sliding_window": 5, "head_dim": 12, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    "qwen2": {**_DECODER, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1,
              "rope_parameters": {"rope_type": "yarn", **_YARN}, "tie_word_embeddings": True},
    "qwen3": {**_DECODER, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "head_dim": 10,
              "attention_bias": True, "max_position_embeddings": 16,
              "rope_parameters": {"rope_type": "dynamic", "factor": 64.0}},
    "gemma": {**_DECODER, "head_dim": 12, "attention_bias": True, "pad_token_id": 0, "num_key_value_heads": 1},
    "gemma2": {**_DECODER, "head_dim": 6, "num_hidden_layers": 4, "layer_types": _ALTERNATING * 2, "sliding_window": 5,
               "query_pre_attn_scalar": 11, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0, "pad_token_id": 0},
    "gemma3_text": {**_DECODER, "head_dim": 10, "num_hidden_layers": 5, "layer_types": [*_ALTERNATING * 2, "sliding_attention"],
                    "sliding_window": 5, "query_pre_attn_scalar": 7, "pad_token_id": 0, "tie_word_embeddings": False,
                    "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "phi3": {**_DECODER, "original_max_position_embeddings": 16, "sliding_window": 7, "pad_token_id": 3,
             "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.75, **_LONG}},
    "mixtral": {**_DECODER, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 7, "output_router_logits": True,
                "router_aux_loss_coef": 0.3},
    "qwen3_moe": {**_DECODER, "head_dim": 10, "moe_intermediate_size": 20, "num_experts": 8, "num_experts_per_tok": 3,
                  "attention_bias": True, "norm_topk_prob": True, "output_router_logits": True, "router_aux_loss_coef": 0.5,
                  "use_sliding_window": True, "sliding_window": 6},
    "olmo2": {**_DECODER, "attention_bias": True, "pad_token_id": 1},
}  # fmt: skip

WORDLESS = ("gemma3_text", "olmo2")
"""Decoders that transformers gives no token classifier."""


def tiny(family: str, **changes: Any) -> dict[str, Any]:
    """The keys of a run file's `model` section."""
    return {"family": family, **TINY[family], **changes}
