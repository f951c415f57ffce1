"""Next-token logits of the targets of many sources, through the Hugging Face model and its key/value cache.

Shape legend: B sources, R tokens of a source, K beams, N = B K targets, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jaxllm.errors import BackendError
from jaxllm.torch_backend.engine import Engine
from jaxllm.torch_backend.model import AttentionKernel, mode, source_inputs

Tokens = NDArray[np.int32]


class TorchTranslator:
    """A `jaxllm.backend.Translator`.  At ZeRO stage 3 every process must feed the same tokens."""

    def __init__(self, engine: Engine, attention: AttentionKernel, device: torch.device, beams: int, max_length: int) -> None:
        self._engine = engine
        self._attention = attention
        self._device = device
        self._beams = beams
        self._max_length = max_length
        self._length = 0
        self._cache: Any = None
        self._source: dict[str, Any] = {}

    def start(self, source_BR: Tokens, segments_BR: Tokens, token: int) -> NDArray[np.float32]:
        """Logits (B, V) after the first token of every target."""
        from transformers import DynamicCache, EncoderDecoderCache

        source = source_inputs(source_BR, segments_BR, self._attention, self._engine.dtype, self._device)
        self._cache, self._length = EncoderDecoderCache(DynamicCache(), DynamicCache()), 0
        output = self._call(np.full(source_BR.shape[0], token, np.int32), source)
        states_NRE = output.encoder_last_hidden_state.repeat_interleave(self._beams, dim=0)
        self._source = {
            "encoder_outputs": (states_NRE,),
            "attention_mask": source["attention_mask"].repeat_interleave(self._beams, dim=0),
        }
        self._cache.batch_repeat_interleave(self._beams)
        return _logits(output)

    def advance(self, tokens_N: Tokens, parents_N: Tokens) -> NDArray[np.float32]:
        """Logits (N, V) after one more token of every target, each of which goes on from what target `parents` was."""
        self._cache.reorder_cache(torch.from_numpy(parents_N).to(self._device, torch.int64))
        return _logits(self._call(tokens_N, self._source))

    @torch.no_grad()
    def _call(self, tokens_N: Tokens, source: dict[str, Any]) -> Any:
        if self._length >= self._max_length:
            raise BackendError(f"a translator for {self._max_length} tokens was given one more; ask for a longer one")
        ids_N1 = torch.from_numpy(tokens_N).to(self._device, torch.int64)[:, None]
        with mode(self._engine.model, training=False), self._engine.numerics():
            output = self._engine.model(**source, decoder_input_ids=ids_N1, past_key_values=self._cache, use_cache=True)
        self._length += 1
        return output


def _logits(output: Any) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = output.logits[:, -1].to("cpu", torch.float32).numpy()
    return logits
