"""Sampling: limits hold, the draw follows the distribution, and it depends on seed and position alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from jaxllm.generation.generate import generate
from jaxllm.generation.sampling import Sampling, probabilities, sample

LOGITS = np.log(np.array([0.05, 0.5, 0.15, 0.3]))


def test_temperature_zero_takes_the_most_likely() -> None:
    assert sample(LOGITS, Sampling(temperature=0.0), 3) == 1


def test_without_limits_the_distribution_is_the_softmax() -> None:
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(1.0, 0, 1.0)), [0.05, 0.5, 0.15, 0.3], rtol=1e-12)


def test_temperature_sharpens() -> None:
    squared = np.array([0.05, 0.5, 0.15, 0.3]) ** 2
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(0.5, 0, 1.0)), squared / squared.sum(), rtol=1e-12)


def test_top_k_keeps_the_k_most_likely() -> None:
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(1.0, 2, 1.0)), [0, 0.625, 0, 0.375], rtol=1e-12)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, [1]), (0.5, [1]), (0.51, [1, 3]), (0.81, [1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, kept: list[int]) -> None:
    assert np.flatnonzero(probabilities(LOGITS, Sampling(1.0, 0, top_p))).tolist() == kept


def test_draws_follow_the_distribution_and_repeat() -> None:
    sampling = Sampling(1.0, 0, 1.0, seed=5)
    draws = [sample(LOGITS, sampling, position) for position in range(20_000)]
    frequencies = np.bincount(draws, minlength=4) / len(draws)
    np.testing.assert_allclose(frequencies, [0.05, 0.5, 0.15, 0.3], atol=0.015)
    assert draws[:50] == [sample(LOGITS, sampling, position) for position in range(50)]
    assert draws[:50] != [sample(LOGITS, Sampling(1.0, 0, 1.0, seed=6), position) for position in range(50)]


class Counting:
    """A decoder whose most likely next token is the last one plus one."""

    def __init__(self) -> None:
        self.calls = 0

    def _after(self, token: int) -> NDArray[np.float32]:
        self.calls += 1
        logits = np.zeros(10, np.float32)
        logits[(token + 1) % 10] = 9.0
        return logits

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return self._after(tokens[-1])

    def decode(self, token: int) -> NDArray[np.float32]:
        return self._after(token)


def test_generation_stops_at_the_limit_and_at_the_stop_token() -> None:
    greedy = Sampling(temperature=0.0)
    decoder = Counting()
    assert list(generate(decoder, [1, 2], greedy, 4)) == [3, 4, 5, 6]
    assert decoder.calls == 4
    assert list(generate(Counting(), [1, 2], greedy, 4, stop=5)) == [3, 4]
    assert list(generate(Counting(), [1, 2], greedy, 0)) == []
