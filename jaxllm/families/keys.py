"""Base of the Hugging Face config keys of a family, with the defaults that transformers gives them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

# Keys a config.json may hold that change nothing about the numbers a causal language model computes.
BOOKKEEPING_KEYS = frozenset(
    "_name_or_path architectures chunk_size_feed_forward dtype id2label is_encoder_decoder label2id model_type "
    "output_attentions output_hidden_states pretraining_tp problem_type return_dict torch_dtype transformers_version "
    "use_cache task_specific_params summary_activation summary_first_dropout summary_proj_to_labels summary_type "
    "summary_use_proj n_ctx gradient_checkpointing".split()
)


class HuggingFaceKeys(BaseModel):
    """A family's config keys, named and defaulted as in transformers; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
