"""Where documents lie, in place of a mask: which runs go without one, and that attention sees the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jaxllm.config.schema import ModelConfig
from jaxllm.families import resolve_model
from jaxllm.torch_backend.documents import Documents, goes_by_documents
from jaxllm.torch_backend.model import model_inputs, packed_mask
from jaxllm.torch_backend.ulysses import UlyssesAttention
from tests.distributed.deepspeed_cases import make_batch, make_run
from tests.tiny import tiny


def test_documents_are_runs_of_equal_segments_and_padding_is_one() -> None:
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32)
    found = Documents.of(segments)
    assert found.length == 6
    assert found.runs == (((0, 2), (2, 5), (5, 6)), ((0, 6),))


@pytest.mark.parametrize(
    ("family", "attention", "context", "expected"),
    [
        ("llama", "auto", 2, True),
        ("llama", "auto", 1, False),
        ("llama", "eager", 2, False),
        ("gpt2", "sdpa", 2, True),
        ("gemma2", "auto", 2, False),  # caps its scores
        ("mistral", "auto", 2, False),  # has a window
    ],
)
def test_only_plain_causal_attention_goes_without_a_mask(family: str, attention: str, context: int, expected: bool) -> None:
    model = resolve_model(ModelConfig.model_validate(tiny(family, vocab_size=96)))
    assert goes_by_documents(model.spec, attention, context) is expected


def test_the_model_is_told_documents_instead_of_a_mask() -> None:
    run, batch = make_run(), make_batch(0)
    inputs = model_inputs(batch, run.model.spec, "auto", torch.float32, torch.device("cpu"), slice(0, 4), by_documents=True)
    told = inputs.arguments["attention_mask"]
    assert isinstance(told, Documents)
    assert told.length == batch.sequence_length


def test_attention_from_document_to_document_is_attention_with_the_mask() -> None:
    """The part between the exchanges, forward and backward, with fewer keys than queries."""
    attention = object.__new__(UlyssesAttention)  # without processes to exchange with
    attention.kernel = "sdpa"
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True  # type: ignore[assignment]
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 3]], np.int32)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 7, heads, 4, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)]
    weights = torch.randn(2, 7, 4, 4, dtype=torch.float64, generator=generator)
    found = []
    for documents in (None, Documents.of(segments)):
        attention.documents = documents
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        mask = packed_mask(torch.from_numpy(segments), "sdpa", torch.float64) if documents is None else None
        mixed = attention._attend(*leaves, module, mask, {})
        found.append([mixed, *torch.autograd.grad((mixed * weights).sum(), leaves)])
    for with_mask, by_documents in zip(*found, strict=True):
        torch.testing.assert_close(by_documents, with_mask, rtol=1e-12, atol=1e-13)
