"""What the Hugging Face config keys of every family have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from jaxllm.families.spec import Activation

# Keys a config.json may hold that change nothing about the numbers a causal language model computes in training.
BOOKKEEPING_KEYS = frozenset({
    # what wrote the file, and for whom
    "_name_or_path", "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "is_llama_config",
    "transformers.js_config", "unsloth_version", "_attn_implementation_autoset",
    "_sliding_window_pattern",
    # what a call returns, and how it is computed
    "chunk_size_feed_forward", "gradient_checkpointing", "n_ctx", "output_attentions", "output_hidden_states", "pretraining_tp",
    "return_dict", "rope_interleaved", "torchscript", "use_bfloat16", "use_cache",
    # other tasks than language modelling
    "cross_attention_hidden_size", "finetuning_task", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
    "num_labels", "problem_type", "pruned_heads", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params", "tie_encoder_decoder",
    # generation, before it had a file of its own
    "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_scores", "prefix", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip

# Keys whose meaning no family computes, and what to do instead.
REFUSED_KEYS: Mapping[str, str] = {
    "quantization_config": "quantised weights are not supported; start from the checkpoint they were made from",
    "auto_map": "code that comes with a checkpoint is never run; remove auto_map if transformers' own {family} is this model",
}

CLASSIFIER_DROPOUT = "Before the head of a token classifier; 0.1 if it is not given."

ActivationName: TypeAlias = Literal["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]

ACTIVATIONS: dict[ActivationName, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class HuggingFaceKeys(BaseModel):
    """A family's config keys, named and defaulted as in transformers; unknown keys and other types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def check_pad_token(pad_token_id: int | None, vocab_size: int) -> None:
    """ValueError unless the padding token, whose row of the embedding starts at zero, is in the vocabulary."""
    if pad_token_id is not None and not 0 <= pad_token_id < vocab_size:
        raise ValueError(f"pad_token_id {pad_token_id} is not in the vocabulary of {vocab_size}; leave it out or correct it")
