"""seq2seq: a target text from a source text; the decoder sees the target shifted by one (teacher forcing).

R rows, S tokens per source, T tokens per target.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jaxllm.config.schema import RunConfig
from jaxllm.data.batch import Batch
from jaxllm.data.prepare import PreparedSplit
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import ConfigError
from jaxllm.objectives.examples import Indices
from jaxllm.objectives.rows import Texts

Tokens = NDArray[np.int32]


def start_token(tokenizer: Tokenizer) -> int:
    """What a decoder begins with: the padding token, as in T5.  ConfigError when the tokenizer names none."""
    start = tokenizer.special_id("pad_token")
    if start is None:
        raise ConfigError("objective.kind", "an encoder-decoder begins with the padding token, but the tokenizer names none")
    return start


def check_end(tokenizer: Tokenizer) -> None:
    """ConfigError unless the tokenizer ends a text with its end-of-text token, by which a decoder learns to end."""
    after = tokenizer.single_template.after
    if tokenizer.eos_id is None or not after or after[-1][0] != tokenizer.eos_id:
        raise ConfigError(
            "data.tokenizer",
            "puts no end-of-text token behind a text, so that no target would end; use one that does, such as one trained with "
            "special_tokens: t5",
        )


class SourceTargetPairs:
    """The pairs of a split, one in a row."""

    def __init__(self, split: PreparedSplit, tokenizer: Tokenizer, config: RunConfig) -> None:
        """DataError when a text is longer than its limit and `data.truncate` is off; ConfigError of `check_end`."""
        check_end(tokenizer)
        template, length = tokenizer.single_template, config.data.sequence_length
        self._sources = Texts(split, template, length, second=None)
        self._targets = Texts(split, template, config.data.target_length or length, column="second", second=None)
        if not config.data.truncate:
            self._sources.check_lengths("source", "data.sequence_length")
            self._targets.check_lengths("target", "data.target_length" if config.data.target_length else "data.sequence_length")
        self._start = start_token(tokenizer)
        self._size = int(split.documents.size)

    def __len__(self) -> int:
        return self._size

    def batch(self, indices_R: Indices, places_R: Indices) -> Batch:  # noqa: ARG002 - the same in every epoch
        """The batch of these pairs."""
        sources, targets = self._sources.rows(indices_R), self._targets.rows(indices_R)
        return paired_batch(sources.tokens, sources.segments, targets.tokens, targets.segments, self._start)


def paired_batch(source_RS: Tokens, source_segments_RS: Tokens, target_RT: Tokens, segments_RT: Tokens, start: int) -> Batch:
    """The batch of sources and targets, padded at their ends."""
    inputs_RT = np.zeros_like(target_RT)
    inputs_RT[:, 0] = start
    inputs_RT[:, 1:] = target_RT[:, :-1]
    return Batch(
        inputs=inputs_RT * segments_RT,
        targets=target_RT,
        weights=segments_RT.astype(np.float32),
        positions=np.arange(target_RT.shape[1], dtype=np.int32) * segments_RT,
        segments=segments_RT,
        source=source_RS,
        source_segments=source_segments_RS,
    )
