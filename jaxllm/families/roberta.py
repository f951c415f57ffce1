"""RoBERTa (arXiv:1907.11692): BERT whose positions begin after the padding token's number, and with other heads."""

from __future__ import annotations

from pydantic import Field, model_validator

from jaxllm.families.encoder import OLD_SPELLINGS, EncoderKeys, HeadNames, encoder_rules, encoder_spec, points
from jaxllm.families.spec import ModelSpec
from jaxllm.families.tasks import Task
from jaxllm.families.weights import WeightRule

ARCHITECTURES = {
    "masked-lm": "RobertaForMaskedLM",
    "sequence-classification": "RobertaForSequenceClassification",
    "token-classification": "RobertaForTokenClassification",
}
BASE_PREFIX = "roberta."
MAX_POSITIONS_KEY = "max_position_embeddings"
POINTS = points("roberta")
STORED_SPELLINGS = OLD_SPELLINGS
_NAMES = HeadNames(
    lm_dense="lm_head.dense",
    lm_norm="lm_head.layer_norm",
    lm_bias="lm_head.bias",
    lm_decoder="lm_head.decoder",
    pooler="classifier.dense",
    classifier="classifier.out_proj",
)


class Keys(EncoderKeys):
    """transformers.RobertaConfig."""

    vocab_size: int = Field(50265, ge=1)
    pad_token_id: int = Field(1, ge=0)
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2

    @model_validator(mode="after")
    def _positions_fit(self) -> Keys:
        if self.max_position_embeddings < self.pad_token_id + 2:
            raise ValueError(
                f"max_position_embeddings {self.max_position_embeddings} leaves no position after pad_token_id "
                f"{self.pad_token_id}, where positions begin; raise it"
            )
        return self


def spec(keys: Keys, task: Task) -> ModelSpec:
    """The ModelSpec of a RoBERTa config with the task's head."""
    return encoder_spec(keys, task, position_offset=keys.pad_token_id + 1, dropout_before_dense=True, lm_activation="gelu")


def rules(keys: Keys, task: Task) -> tuple[WeightRule, ...]:
    """Every weight of a RoBERTa model, in checkpoint order."""
    return encoder_rules(keys, spec(keys, task), "roberta", _NAMES, position_padding=keys.pad_token_id)
