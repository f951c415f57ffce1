"""Where documents lie, in place of a mask: which runs go without one, and that attention sees the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from jaxllm.config.batch import BatchPlan
from jaxllm.config.schema import ModelConfig
from jaxllm.families import Model, resolve_model
from jaxllm.torch_backend.document_attention import DocumentAttention, attend_by_documents, plain_attention
from jaxllm.torch_backend.documents import Documents, goes_by_documents
from jaxllm.torch_backend.float64 import true_float64
from jaxllm.torch_backend.model import build_model, model_inputs, packed_mask
from jaxllm.torch_backend.step import Loop
from tests.distributed.deepspeed_cases import make_batch, make_run
from tests.tiny import TINY, tiny


def test_documents_are_runs_of_equal_segments_and_padding_is_one() -> None:
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32)
    found = Documents.of(segments)
    assert found.length == 6
    assert found.runs == (((0, 2), (2, 5), (5, 6)), ((0, 6),))
    assert found.lengths == [2, 3, 1, 6]
    assert not found.whole
    assert Documents.of(segments[1:]).whole


@pytest.mark.parametrize(
    ("family", "attention", "longest", "expected"),
    [
        ("llama", "auto", 40, True),
        ("llama", "eager", 40, False),
        ("gpt2", "sdpa", 40, True),
        ("gemma2", "auto", 4, False),  # caps its scores
        ("mistral", "auto", 5, True),  # has a window of 5
        ("mistral", "auto", 6, False),
        ("gemma3_text", "auto", 6, False),  # in some of its layers
    ],
)
def test_only_plain_causal_attention_goes_without_a_mask(family: str, attention: str, longest: int, expected: bool) -> None:
    model = resolve_model(ModelConfig.model_validate(tiny(family, vocab_size=96)))
    assert goes_by_documents(model.spec, attention, longest) is expected


@pytest.mark.parametrize(("lengths", "compiled", "told"), [([5, 3], False, True), ([5, 3], True, False), ([8], True, True)])
def test_a_compiled_model_goes_by_whole_rows_only(lengths: list[int], compiled: bool, told: bool) -> None:
    run, batch = make_run(), make_batch(0)
    rows = np.concatenate([np.full(length, number, np.int32) for number, length in enumerate(lengths, 1)])
    batch = replace(batch, segments=np.tile(rows, (batch.rows, 1)))
    loop = Loop(None, None, BatchPlan(1, 1), "auto", 0, run.model.spec, compiled=compiled)  # type: ignore[arg-type]
    assert (loop._documents(batch) is not None) is told


def test_the_model_is_told_documents_instead_of_a_mask() -> None:
    run, batch = make_run(), make_batch(0)
    documents = Documents.of(batch.segments)
    inputs = model_inputs(batch, run.model.spec, "auto", torch.float32, torch.device("cpu"), slice(0, 4), documents=documents)
    told = inputs.arguments["attention_mask"]
    assert told is documents
    assert told.length == batch.sequence_length


def test_attention_from_document_to_document_is_attention_with_the_mask() -> None:
    """Forward and backward, with fewer keys than queries."""
    attention = DocumentAttention("sdpa")
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True  # type: ignore[assignment]
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 3]], np.int32)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, heads, 7, 4, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)]
    weights = torch.randn(2, 7, 4, 4, dtype=torch.float64, generator=generator)
    found = []
    for documents in (None, Documents.of(segments)):
        attention.tell(documents)
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        mask = packed_mask(torch.from_numpy(segments), "sdpa", torch.float64) if documents is None else None
        mixed = attention(module, *leaves, mask)[0]
        found.append([mixed, *torch.autograd.grad((mixed * weights).sum(), leaves)])
    for with_mask, by_documents in zip(*found, strict=True):
        torch.testing.assert_close(by_documents, with_mask, rtol=1e-12, atol=1e-13)


def model_of(family: str) -> Model:
    return resolve_model(ModelConfig.model_validate(tiny(family, vocab_size=96, initializer_range=0.3)))


PLAIN = [family for family in TINY if goes_by_documents(model_of(family).spec, "auto", 1)]


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("packed", [True, False])
def test_a_model_by_documents_is_the_model_with_the_mask(family: str, packed: bool) -> None:
    """Whole rows, and rows of several documents; the plain kernel is still there for sequences that are fed as they are."""
    spec = (model := model_of(family)).spec
    length = min(12, *(each.window or 12 for each in spec.attentions))
    segments = np.array([[1, 1, *[2] * (length - 2)], [1] * (length - 1) + [0]] if packed else [[1] * length] * 2, np.int32)
    starts = np.array([[0, 0, *[2] * (length - 2)], [0] * (length - 1) + [length - 1]] if packed else [[0] * length] * 2)
    positions = torch.from_numpy(np.arange(length) - starts)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 96, (2, length)))
    with true_float64():
        module = build_model(model, "auto", torch.float64, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            module.eval()
            mask = packed_mask(torch.from_numpy(segments), "sdpa", torch.float64)
            expected = module(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits
            attend_by_documents(module)
            told = Documents.of(segments)
            found = module(input_ids=tokens, position_ids=positions, attention_mask=told, use_cache=False).logits
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
            masked = module(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(masked, expected, rtol=0, atol=0)
            again = module(input_ids=tokens[:1, :2], use_cache=False).logits
            torch.testing.assert_close(again, expected[:1, :2], rtol=1e-11, atol=1e-12)
            with plain_attention(module):
                alone = module(input_ids=tokens[:1, :2], use_cache=False).logits
            torch.testing.assert_close(alone, expected[:1, :2], rtol=1e-11, atol=1e-12)


def test_most_families_are_tried() -> None:
    assert {"gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "mixtral", "qwen3_moe", "olmo2"} <= set(PLAIN)
