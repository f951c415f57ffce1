"""Next-token logits of one sequence through the Hugging Face model and its key/value cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from jaxllm.errors import BackendError
from jaxllm.torch_backend.engine import Engine
from jaxllm.torch_backend.model import mode
from jaxllm.torch_backend.visibility import fix_rope_length


class TorchDecoder:
    """A `jaxllm.backend.Decoder`.

    Under tensor parallelism and at ZeRO stage 3 each process holds a part of the weights, so every process must feed the same
    tokens.
    """

    def __init__(self, engine: Engine, device: torch.device, max_length: int) -> None:
        self._engine = engine
        self._device = device
        self._max_length = max_length
        self._length = 0

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits (V,) after the prompt; at least one token."""
        from transformers import DynamicCache

        self._cache = DynamicCache()
        self._length = 0
        return self._feed(tokens)

    def decode(self, token: int) -> NDArray[np.float32]:
        """Logits (V,) after one more token."""
        return self._feed([token])

    @torch.no_grad()
    def _feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        stop = self._length + len(tokens)
        if not tokens or stop > self._max_length:
            raise BackendError(f"a decoder for {self._max_length} tokens was given token {stop}; ask for a longer one")
        ids_BS = torch.tensor([tokens], dtype=torch.int64, device=self._device)
        positions_BS = torch.arange(self._length, stop, device=self._device)[None]
        with mode(self._engine.model, training=False), self._engine.numerics(), self._engine.whole_sequences():
            fix_rope_length(self._engine.model, self._max_length)
            output = self._engine.model(
                input_ids=ids_BS, position_ids=positions_BS, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        self._length = stop
        logits: NDArray[np.float32] = output.logits[0, -1].to("cpu", torch.float32).numpy()
        return logits
