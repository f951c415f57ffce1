from __future__ import annotations

import pytest

from jaxllm.planning import scaling


def test_the_optimum_is_the_lowest_loss_of_its_flops() -> None:
    flops = 5.76e23  # Chinchilla's and Gopher's budget
    best = scaling.optimum(flops)
    assert 6 * best.parameters * best.tokens == pytest.approx(flops)
    around = [scaling.loss(best.parameters * f, best.tokens / f) for f in (0.9, 1.1)]
    assert scaling.loss(best.parameters, best.tokens) < min(around)


def test_the_papers_advice() -> None:
    """About 20 tokens for each parameter, and 70 billion parameters for Chinchilla's budget (arXiv:2203.15556)."""
    assert scaling.optimum(5.76e23).parameters == pytest.approx(70e9, rel=0.1)
    for parameters in (400e6, 1e9, 10e9, 67e9):
        assert 17 < scaling.optimal_tokens(parameters) / parameters < 26


def test_optimal_tokens_invert_the_optimum() -> None:
    best = scaling.optimum(1e21)
    assert scaling.optimal_tokens(best.parameters) == pytest.approx(best.tokens, rel=1e-9)


def test_an_over_trained_model_is_worth_a_larger_one_and_an_under_trained_one_a_smaller() -> None:
    optimal = scaling.optimal_tokens(8e9)
    assert scaling.equivalent(8e9, optimal) == pytest.approx(8e9, rel=1e-6)
    assert scaling.equivalent(8e9, 15e12) > 3 * 8e9
    assert scaling.equivalent(8e9, optimal / 4) < 8e9
    assert "compute-optimal: no" in scaling.meaning(8e9, optimal)
    assert "over-trained" in scaling.meaning(8e9, 15e12)
    assert "under-trained: 4.0 times" in scaling.meaning(8e9, optimal / 4)
