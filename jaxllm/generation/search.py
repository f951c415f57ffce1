"""Beam search over the targets of many sources at once, on the host in double precision; greedy with one beam.

The search is transformers' (`generate(num_beams=..., early_stopping=False)`): both backends, given the same logits, write the
same text.

Shape legend: B sources, K beams of each, N = B K targets, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from jaxllm.backend import Translator

Tokens = NDArray[np.int32]
_HOPELESS = -1e9


@dataclass(frozen=True)
class Search:
    """How a target is chosen.

    beams: how many are followed at once.  max_new_tokens: of a target, its end included.  length_penalty: a target's score is
    its log-probability divided by its length to this power, so that more than 0 favours long ones.
    """

    beams: int
    max_new_tokens: int
    length_penalty: float = 1.0


@dataclass
class _Targets:
    """Of one source: targets that go on, best first, and those that have ended, with their scores."""

    running: list[list[int]]
    ended: list[tuple[float, list[int]]] = field(default_factory=list)
    open: bool = True

    def end(self, score: float, tokens: list[int], beams: int) -> None:
        """Keep a target that has ended if it is among the best."""
        self.ended = sorted([*self.ended, (score, tokens)], key=lambda each: -each[0])[:beams]


def translate(
    translator: Translator, source_BR: Tokens, segments_BR: Tokens, search: Search, start: int, end: int
) -> list[list[int]]:
    """The best target of each source, without `start` and `end`.

    translator: with `search.beams` beams.  start: what a target begins with; end: what ends one.
    """
    beams = search.beams
    logits_BV = translator.start(source_BR, segments_BR, start)
    batch, vocabulary = logits_BV.shape
    found = [_Targets([[] for _ in range(beams)]) for _ in range(batch)]
    scores_BK = np.full((batch, beams), _HOPELESS)
    scores_BK[:, 0] = 0.0  # all beams are still the same: only one of them counts
    logits_NV = np.repeat(logits_BV, beams, axis=0)
    for length in range(1, search.max_new_tokens + 1):
        totals = scores_BK[..., None] + _log_softmax(logits_NV).reshape(batch, beams, vocabulary)
        totals_BC, places_BC = _best(totals.reshape(batch, -1), 2 * beams)
        from_BC, token_BC = np.divmod(places_BC, vocabulary)
        ends_BC = token_BC == end if length < search.max_new_tokens else np.ones_like(token_BC, bool)
        # As many as there are beams go on: at most half of the candidates can have ended.
        keep_BK = np.argsort(ends_BC, axis=1, kind="stable")[:, :beams]
        for targets, totals_C, from_C, token_C, ends_C, keep_K in zip(
            found, totals_BC, from_BC, token_BC, ends_BC, keep_BK, strict=True
        ):
            candidates = [
                [*targets.running[parent], token] for parent, token in zip(from_C.tolist(), token_C.tolist(), strict=True)
            ]
            for rank in np.nonzero(ends_C[:beams])[0] if targets.open else ():
                targets.end(totals_C[rank] / length**search.length_penalty, candidates[rank], beams)
            targets.running = [candidates[rank] for rank in keep_K]
            # What goes on can at best keep its log-probability; it is judged at its present length.
            best = totals_C[keep_K[0]] / length**search.length_penalty
            targets.open &= len(targets.ended) < beams or best > targets.ended[-1][0]
        if length == search.max_new_tokens or not any(targets.open for targets in found):
            break
        scores_BK = np.take_along_axis(totals_BC, keep_BK, axis=1)
        parents_BK = np.take_along_axis(from_BC, keep_BK, axis=1) + np.arange(batch)[:, None] * beams
        token_BK = np.take_along_axis(token_BC, keep_BK, axis=1)
        logits_NV = translator.advance(token_BK.ravel().astype(np.int32), parents_BK.ravel().astype(np.int32))
    return [_without(end, max(targets.ended, key=lambda each: each[0])[1]) for targets in found]


def _without(end: int, tokens: list[int]) -> list[int]:
    return tokens[:-1] if tokens[-1] == end else tokens


def _log_softmax(logits_NV: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits_NV.astype(np.float64) - logits_NV.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _best(values_BM: NDArray[np.float64], count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The `count` largest of each row, largest first, of equals the first, and their places."""
    count = min(count, values_BM.shape[1])
    places = np.sort(np.argpartition(-values_BM, count - 1, axis=1)[:, :count], axis=1)
    values = np.take_along_axis(values_BM, places, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(places, order, axis=1)
