"""What a model learns to predict: documents and examples to inputs, targets and loss weights, in numpy."""

from __future__ import annotations

from jaxllm.config.objective import (
    CausalLmObjective,
    MaskedLmObjective,
    Seq2SeqObjective,
    SequenceClassificationObjective,
    SpanCorruptionObjective,
    TokenClassificationObjective,
)
from jaxllm.config.schema import RunConfig
from jaxllm.data.packing import create_packing
from jaxllm.data.prepare import PreparedData, SplitName
from jaxllm.objectives.causal_lm import CausalLM
from jaxllm.objectives.classification import LabelledTexts
from jaxllm.objectives.examples import Examples, PackedExamples
from jaxllm.objectives.masked_lm import MaskedLM
from jaxllm.objectives.seq2seq import SourceTargetPairs
from jaxllm.objectives.span_corruption import SpanCorruption

__all__ = ["Examples", "open_examples"]


def open_examples(prepared: PreparedData, config: RunConfig, split: SplitName) -> Examples:
    """The rows of a split, as the objective of the run makes them.

    DataError when the split has no row, or an example does not fit; ConfigError when the tokenizer lacks what the objective
    needs.
    """
    objective = config.objective
    part = prepared.split(split)
    match objective:
        case CausalLmObjective():
            causal = CausalLM(cross_document_attention=config.data.cross_document_attention)
            return PackedExamples(create_packing(part, config.data, causal.overlap, config.seed), causal)
        case MaskedLmObjective():
            masked = MaskedLM.of(objective, prepared.tokenizer, config)
            return PackedExamples(create_packing(part, config.data, masked.overlap, config.seed), masked)
        case SequenceClassificationObjective() | TokenClassificationObjective():
            return LabelledTexts(part, prepared.tokenizer, config, objective)
        case Seq2SeqObjective():
            return SourceTargetPairs(part, prepared.tokenizer, config)
        case SpanCorruptionObjective():
            spans = SpanCorruption.of(objective, prepared.tokenizer, config)
            data = config.data.model_copy(update={"sequence_length": spans.length})
            return PackedExamples(create_packing(part, data, spans.overlap, config.seed), spans)
