"""The models of the planner's cases, as `model` sections of run files."""

from __future__ import annotations

from benchmarks._models import llama_sizes

_LLAMA = {"family": "llama", "max_position_embeddings": 8192}


LLAMA_TINY = {**_LLAMA, **llama_sizes(320, 700, 3, 5, 5, 1000)}
LLAMA_WIDE = {**_LLAMA, **llama_sizes(512, 1344, 4, 8, 4, 2048)}
LLAMA_SMALL = {**_LLAMA, **llama_sizes(512, 1408, 6, 8, 4, 6016)}
LARGE_VOCABULARY = {**LLAMA_SMALL, "vocab_size": 48000}
LLAMA_100M = {**_LLAMA, **llama_sizes(1024, 2816, 8, 16, 8, 8192)}
LLAMA_1B = {**_LLAMA, **llama_sizes(2048, 8192, 16, 32, 8, 128256), "head_dim": 64, "tie_word_embeddings": True}
LLAMA_7B = {**_LLAMA, **llama_sizes(4096, 11008, 32, 32, 32, 32000)}
LLAMA_8B = {**_LLAMA, **llama_sizes(4096, 14336, 32, 32, 8, 128256)}
LLAMA_70B = {**_LLAMA, **llama_sizes(8192, 28672, 80, 64, 8, 128256)}
LLAMA_405B = {**_LLAMA, **llama_sizes(16384, 53248, 126, 128, 8, 128256)}
QWEN3 = {**LLAMA_SMALL, "family": "qwen3", "head_dim": 64}

_GPT2 = {"family": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = {**_GPT2, "vocab_size": 50304}
GPT2_TINY = {**_GPT2, "n_embd": 320, "n_layer": 3, "n_head": 5, "vocab_size": 1000, "n_positions": 512}
GPT2_SMALL = {**_GPT2, "n_embd": 512, "n_layer": 6, "n_head": 8, "vocab_size": 8192}
GPT2_XL = {**GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25}

_MIXTRAL = {"family": "mixtral", "max_position_embeddings": 8192}
MIXTRAL_TINY = {**_MIXTRAL, **llama_sizes(256, 448, 3, 4, 4, 1000), "num_local_experts": 4, "num_experts_per_tok": 2}
MIXTRAL_SMALL = {**_MIXTRAL, **llama_sizes(512, 896, 4, 8, 4, 6016), "num_local_experts": 8, "num_experts_per_tok": 2}
MIXTRAL_8X7B = {**_MIXTRAL, **llama_sizes(4096, 14336, 32, 32, 8, 32000), "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN3_30B = {
    "family": "qwen3_moe",
    **llama_sizes(2048, 6144, 48, 32, 4, 151936),
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}

_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {"family": "bert", "vocab_size": 30522, **_NO_DROPOUT}
BERT_TINY = {**BERT, "hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 3,
             "num_attention_heads": 5, "vocab_size": 1000}  # fmt: skip
BERT_SMALL = {**BERT, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
              "num_attention_heads": 8, "vocab_size": 8192}  # fmt: skip

T5_TINY = {"family": "t5", "vocab_size": 1000, "d_model": 320, "d_kv": 64, "d_ff": 1280, "num_layers": 2, "num_heads": 5,
           "dropout_rate": 0.0}  # fmt: skip
T5_SMALL = {"family": "t5", "vocab_size": 8192, "dropout_rate": 0.0}
T5_BASE = {"family": "t5", "vocab_size": 32128, "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12,
           "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}  # fmt: skip
