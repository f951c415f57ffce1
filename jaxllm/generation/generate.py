"""The generation loop over a backend's decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxllm.backend import Decoder
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import JaxllmError
from jaxllm.generation.sampling import Sampling, sample


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens a text starts from: the prompt's, or the end-of-text token (which begins a new document) when it is empty.

    JaxllmError when the prompt is empty and the tokenizer has no such token.
    """
    tokens, end = tokenizer.encode(prompt), tokenizer.eos_id
    if tokens:
        return tokens
    if end is None:
        raise JaxllmError("the tokenizer names no end-of-text token to begin from; give a prompt (--prompt, sample.prompt)")
    return [end]


def generate(
    decoder: Decoder, prompt: Sequence[int], sampling: Sampling, max_new_tokens: int, stop: int | None = None
) -> Iterator[int]:
    """The tokens that follow `prompt`, one by one, until `stop` (not given out) or max_new_tokens."""
    if max_new_tokens < 1:
        return
    logits = decoder.prefill(prompt)
    for position in range(len(prompt), len(prompt) + max_new_tokens):
        token = sample(logits, sampling, position)
        if token == stop:
            return
        yield token
        if position + 1 < len(prompt) + max_new_tokens:
            logits = decoder.decode(token)
