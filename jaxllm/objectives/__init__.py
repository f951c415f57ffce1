"""What a model learns to predict: packed rows to inputs, targets and loss weights, in numpy."""

from __future__ import annotations

from typing import Protocol

from jaxllm.config.schema import RunConfig
from jaxllm.data.batch import Batch
from jaxllm.data.packing import Rows
from jaxllm.objectives.causal_lm import CausalLM


class Objective(Protocol):
    """Turns rows into a batch.  overlap: tokens a row needs beyond sequence_length."""

    @property
    def overlap(self) -> int: ...

    def batch(self, rows: Rows) -> Batch:
        """The batch of these rows, in their order; a row depends on nothing but itself."""
        ...


def create_objective(config: RunConfig) -> Objective:
    """The objective of a run."""
    return CausalLM(cross_document_attention=config.data.cross_document_attention)
