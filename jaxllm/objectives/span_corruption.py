"""span-corruption: spans of a text are left out, and a sentinel stands for each (T5, arXiv:1910.10683, section 3.1.4).

    text      Thank you for inviting me to your party last week .
    source    Thank you <extra_id_0> me to your party <extra_id_1> week . </s>
    target    <extra_id_0> for inviting <extra_id_1> last </s>

Which spans is a function of the run's seed and of the row's place in the data, as in `masked_lm`.

R rows, S tokens per source, T tokens per target, W tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from jaxllm.config.objective import SpanCorruptionObjective
from jaxllm.config.schema import RunConfig
from jaxllm.data.batch import Batch
from jaxllm.data.order import words
from jaxllm.data.packing import Rows
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import ConfigError
from jaxllm.objectives.examples import Indices
from jaxllm.objectives.seq2seq import paired_batch, start_token


@dataclass(frozen=True)
class SpanCorruption:
    """settings: how much is left out.  sentinels: their tokens in order.  length: W, the most that fits S and T."""

    settings: SpanCorruptionObjective
    sentinels: tuple[int, ...]
    start: int
    end: int
    length: int
    source_length: int
    target_length: int
    seed: int
    overlap: ClassVar[int] = 0

    @classmethod
    def of(cls, settings: SpanCorruptionObjective, tokenizer: Tokenizer, config: RunConfig) -> SpanCorruption:
        """The objective of a run.  ConfigError when the tokenizer has too few sentinels or no end-of-text token."""
        names = (f"<extra_id_{number}>" for number in range(config.data.sequence_length))
        sentinels: list[int] = []
        for number in map(tokenizer.backend.token_to_id, names):
            if number is None:
                break
            sentinels.append(number)
        if tokenizer.eos_id is None or not sentinels:
            raise ConfigError(
                "objective.kind",
                "span-corruption needs a tokenizer with an end-of-text token and sentinels <extra_id_0>, ...; train one with "
                "the special_tokens of t5",
            )
        source = config.data.sequence_length
        target = config.data.target_length or source
        length = max(n for n in range(1, 2 * source) if _fits(n, settings, source, target))
        spans = _counts(length, settings)[1]
        if spans > len(sentinels):
            raise ConfigError(
                "objective.mean_span_length",
                f"{settings.mean_span_length:g} makes {spans} spans of a row, but the tokenizer has {len(sentinels)} "
                "sentinels; raise it or shorten data.sequence_length",
            )
        return cls(settings, tuple(sentinels), start_token(tokenizer), tokenizer.eos_id, length, source, target, config.seed)

    def batch(self, rows: Rows, indices_R: Indices, places_R: Indices) -> Batch:  # noqa: ARG002 - drawn anew in every epoch
        """Rows of W tokens -> a batch; a row is one text, also where it holds the end of a document."""
        count = rows.tokens.shape[0]
        source_RS, source_segments_RS = (np.zeros((count, self.source_length), np.int32) for _ in range(2))
        target_RT, segments_RT = (np.zeros((count, self.target_length), np.int32) for _ in range(2))
        for row, place in enumerate(places_R.tolist()):
            text = rows.tokens[row][rows.segments[row] > 0]
            source, target = self._corrupt(text, place)
            source_RS[row, : len(source)], source_segments_RS[row, : len(source)] = source, 1
            target_RT[row, : len(target)], segments_RT[row, : len(target)] = target, 1
        return paired_batch(source_RS, source_segments_RS, target_RT, segments_RT, self.start)

    def _corrupt(self, text_W: NDArray[np.int32], place: int) -> tuple[list[int], list[int]]:
        """Source and target of one text."""
        noise, spans = _counts(text_W.size, self.settings)
        draws = words(self.seed, "spans", place, 2 * max(text_W.size, 1)).reshape(2, -1)
        kept_lengths, noise_lengths = (_split(n, spans, d) for n, d in ((text_W.size - noise, draws[0]), (noise, draws[1])))
        source: list[int] = []
        target: list[int] = []
        begin = 0
        for sentinel, kept, left_out in zip(self.sentinels, kept_lengths, noise_lengths, strict=False):
            source += [*text_W[begin : begin + kept].tolist(), sentinel]
            target += [sentinel, *text_W[begin + kept : begin + kept + left_out].tolist()]
            begin += kept + left_out
        return [*source, self.end], [*target, self.end]


def _counts(length: int, settings: SpanCorruptionObjective) -> tuple[int, int]:
    """Tokens left out of a text, and in how many spans: at least one of each, and at least as many tokens kept as spans."""
    noise = min(max(round(length * settings.noise_density), 1), max(length - 1, 1))
    spans = max(round(noise / settings.mean_span_length), 1)
    return noise, min(spans, max(length - noise, 1))


def _fits(length: int, settings: SpanCorruptionObjective, source: int, target: int) -> bool:
    """Whether the source and the target of a text of `length` tokens, each with its end, fit."""
    noise, spans = _counts(length, settings)
    return length - noise + spans + 1 <= source and noise + spans + 1 <= target


def _split(total: int, parts: int, draws: NDArray[np.uint64]) -> list[int]:
    """`total` cut into `parts` lengths of at least one, every cut equally likely."""
    if parts < 2:
        return [total]
    cuts = np.sort(np.argsort(draws[: total - 1], kind="stable")[: parts - 1]) + 1
    return [int(length) for length in np.diff(np.r_[0, cuts, total])]
