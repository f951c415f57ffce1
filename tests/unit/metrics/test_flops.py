"""The formula against the operations that PyTorch counts while the Hugging Face model of the same config runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from jaxllm.config.schema import ModelConfig
from jaxllm.families import Model, Task, resolve_model
from jaxllm.metrics.flops import flops_per_token

LLAMA = {
    "family": "llama",
    "vocab_size": 331,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
GPT2 = {"family": "gpt2", "vocab_size": 331, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}


def counted(model: Model, batch: int, sequence: int, backward: bool) -> dict[str, int]:
    """FLOPs of the matrix products of the Hugging Face model, by operation."""
    experts = {} if model.spec.mlp.experts is None else {"experts_implementation": "eager"}
    config = transformers.AutoConfig.for_model(**dict(model.huggingface_config), attn_implementation="eager", **experts)
    network = transformers.AutoModelForCausalLM.from_config(config)
    tokens = torch.zeros((batch, sequence), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        output = network(tokens, use_cache=False)
        if backward:
            output.logits.sum().backward()
    return {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize(
    "keys",
    [LLAMA, {**LLAMA, "tie_word_embeddings": True}, GPT2, {**LLAMA, "family": "mixtral"}],
    ids=["llama", "llama tied", "gpt2 biased", "mixtral"],
)
def test_forward_equals_what_pytorch_counts(keys: dict[str, Any]) -> None:
    model = resolve_model(ModelConfig.model_validate(keys))
    batch, sequence = 2, 64
    flops = flops_per_token(model.spec, sequence)
    found = counted(model, batch, sequence, backward=False)
    # The program computes the full square of attention, of which the formula counts the half that is not masked.
    assert found.pop("aten.bmm") == 2 * flops.attention * batch * sequence
    assert sum(found.values()) == (flops.projections + flops.mlp + flops.head) * batch * sequence


def test_backward_costs_twice_the_forward_pass() -> None:
    model = resolve_model(ModelConfig.model_validate(GPT2))
    forward = sum(counted(model, 2, 64, backward=False).values())
    both = sum(counted(model, 2, 64, backward=True).values())
    flops = flops_per_token(model.spec, 64)
    assert both == 3 * forward
    assert flops.training == 3 * flops.forward


@pytest.mark.parametrize("window", [1, 8, 64, 100])
def test_a_window_counts_what_it_shows(window: int) -> None:
    """Pairs of query and key that are seen, the diagonal by halves as without a window."""
    whole = resolve_model(ModelConfig.model_validate({**LLAMA, "family": "mistral", "sliding_window": None}))
    model = resolve_model(ModelConfig.model_validate({**LLAMA, "family": "mistral", "sliding_window": window}))
    distance = np.subtract.outer(np.arange(64), np.arange(64))
    seen = ((distance > 0) & (distance < window)).sum() + 64 / 2
    every = (distance > 0).sum() + 64 / 2
    share = flops_per_token(model.spec, 64).attention / flops_per_token(whole.spec, 64).attention
    assert share == pytest.approx(seen / every, abs=0.5 * min(window, 64) / 32)


def test_a_published_size() -> None:
    """Llama 3 8B: 6 FLOPs for each of the 7.5e9 parameters that multiply (all but the embedding), and attention."""
    model = resolve_model(
        ModelConfig.model_validate(
            {"family": "llama", "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
        )
    )
    embedding, norms = 128256 * 4096, 65 * 4096
    flops = flops_per_token(model.spec, 8192)
    assert model.parameters == 8_030_261_248
    assert flops.training == 6 * (model.parameters - embedding - norms) + 6 * 32 * 4096 * 8192


@pytest.mark.parametrize(
    ("task", "head"),
    [
        (Task("masked-lm"), 2 * 48 * (48 + 331)),
        (Task("token-classification", ("a", "b")), 2 * 48 * 2),
        (Task("sequence-classification", ("a", "b"), "single_label_classification"), 2 * 48 * (48 + 2) / 16),
    ],
)
def test_encoders_attend_to_whole_sequences_and_have_their_own_heads(task: Task, head: float) -> None:
    keys = {"family": "bert", "vocab_size": 331, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
    spec = resolve_model(ModelConfig.model_validate({**keys, "intermediate_size": 96}), task=task).spec
    found = flops_per_token(spec, 16)
    assert found.attention == 3 * 4 * 48 * 16
    assert found.head == pytest.approx(head)
