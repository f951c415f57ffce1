"""Masks and rotary positions that the model is told, against what transformers works out by itself for whole rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from jaxllm.config.schema import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.families import Model, resolve_model
from jaxllm.torch_backend.float64 import true_float64
from jaxllm.torch_backend.model import build_model, packed_mask
from jaxllm.torch_backend.visibility import attention_implementation, fix_rope_length, windowed
from tests.tiny import TINY, tiny

CPU = torch.device("cpu")
LENGTH = 40


def model_of(family: str, **changes: Any) -> Model:
    return resolve_model(ModelConfig.model_validate(tiny(family, vocab_size=96, initializer_range=0.3, **changes)))


def built(model: Model, attention: str = "auto") -> Any:
    with true_float64():
        module = build_model(model, attention, torch.float64, CPU)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module.eval()


def kernels(family: str) -> list[str]:
    return ["eager"] if model_of(family).spec.attention.softcap is not None else ["eager", "sdpa"]


@pytest.mark.parametrize(("family", "kernel"), [(family, kernel) for family in TINY for kernel in kernels(family)])
def test_a_whole_row_is_what_transformers_computes_by_itself(family: str, kernel: str) -> None:
    """Its own masks, windows and rotary positions: no mask is given, so the hook does nothing."""
    module = built(model_of(family), kernel)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 96, (2, LENGTH)))
    mask = packed_mask(torch.ones(2, LENGTH, dtype=torch.int32), kernel, torch.float64)  # type: ignore[arg-type]
    with true_float64(), torch.no_grad():
        alone = module(input_ids=tokens, use_cache=False).logits
        told = module(input_ids=tokens, attention_mask=mask, position_ids=torch.arange(LENGTH)[None].expand(2, -1)).logits
    assert (alone - told).abs().max() <= 1e-12 * alone.abs().max()


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_rotary_positions_are_those_of_the_whole_row_whatever_is_packed_into_it(family: str) -> None:
    """Not of the longest document of a micro-batch, nor of a sequence that came before."""
    module = built(model_of(family))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 96, (1, LENGTH)))
    segments = torch.tensor([[1] * 10 + [2] * 30])
    positions = torch.cat([torch.arange(10), torch.arange(30)])[None]

    def first_document(rows: int) -> torch.Tensor:
        mask = packed_mask(segments.expand(rows, -1), "sdpa", torch.float64)
        out = module(
            input_ids=tokens.expand(rows, -1), attention_mask=mask, position_ids=positions.expand(rows, -1), use_cache=False
        )
        return out.logits[0, :10]

    with true_float64(), torch.no_grad():
        packed = first_document(1)
        module(input_ids=tokens.repeat(1, 3), attention_mask=packed_mask(torch.ones(1, 3 * LENGTH), "sdpa", torch.float64))
        torch.testing.assert_close(first_document(2), packed, rtol=1e-12, atol=1e-13)
        fix_rope_length(module, 10)
        alone = module(input_ids=tokens[:, :10], use_cache=False).logits[0]
        assert (alone - packed).abs().max() > 1e-3 * packed.abs().max()
        fix_rope_length(module, LENGTH)
        alone = module(input_ids=tokens[:, :10], use_cache=False).logits[0]
        torch.testing.assert_close(alone, packed, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_window_hides_what_is_further_back(kind: torch.dtype) -> None:
    mask = packed_mask(torch.tensor([[1, 1, 1, 1, 2, 2]]), "sdpa" if kind == torch.bool else "eager", torch.float32)
    seen = windowed(mask, 2)
    assert ((seen if kind == torch.bool else seen == 0)[0, 0].int().tolist()) == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    assert windowed(mask, None) is mask
    assert windowed(mask, 6) is mask


def test_attention_is_one_that_the_model_can_run_with() -> None:
    capped, plain = model_of("gemma2"), model_of("llama")
    assert attention_implementation(capped, "auto") == attention_implementation(capped, "eager") == "eager"
    assert attention_implementation(plain, "auto") == attention_implementation(plain, "sdpa") == "sdpa"
    with pytest.raises(ConfigError, match=r"deepspeed.attention: sdpa cannot cap scores \(at 4\) as this model does; use auto"):
        attention_implementation(capped, "sdpa")
