"""BERT (arXiv:1810.04805): an encoder with learned positions, token types and norms after the residual sums."""

from __future__ import annotations

from jaxllm.families.encoder import OLD_SPELLINGS, EncoderKeys, HeadNames, encoder_rules, encoder_spec, points
from jaxllm.families.spec import ModelSpec
from jaxllm.families.tasks import Task
from jaxllm.families.weights import WeightRule

ARCHITECTURES = {
    "masked-lm": "BertForMaskedLM",
    "sequence-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
}
BASE_PREFIX = "bert."
MAX_POSITIONS_KEY = "max_position_embeddings"
POINTS = points("bert")
STORED_SPELLINGS = OLD_SPELLINGS
_LM = "cls.predictions"
_NAMES = HeadNames(
    lm_dense=f"{_LM}.transform.dense",
    lm_norm=f"{_LM}.transform.LayerNorm",
    lm_bias=f"{_LM}.bias",
    lm_decoder=f"{_LM}.decoder",
    pooler="bert.pooler.dense",
    classifier="classifier",
)


class Keys(EncoderKeys):
    """transformers.BertConfig."""


def spec(keys: Keys, task: Task) -> ModelSpec:
    """The ModelSpec of a BERT config with the task's head."""
    return encoder_spec(keys, task, position_offset=0, dropout_before_dense=False)


def rules(keys: Keys, task: Task) -> tuple[WeightRule, ...]:
    """Every weight of a BERT model, in checkpoint order."""
    return encoder_rules(keys, spec(keys, task), "bert", _NAMES, position_padding=None)
