from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from jaxllm.backend import Hyper
from jaxllm.config.schema import OptimizerConfig, RunConfig, ScheduleConfig
from jaxllm.errors import ConfigError
from jaxllm.schedule import check_schedule, hyper, learning_rate

OPTIMIZER = OptimizerConfig(learning_rate=3e-4)


def rates(total: int, **schedule: Any) -> list[float]:
    return [learning_rate(step, total, OPTIMIZER, ScheduleConfig(**schedule)) for step in range(total)]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warmup_starts_at_one_part_of_the_highest_rate_and_reaches_it(kind: str) -> None:
    course = rates(100, kind=kind, warmup_steps=10)
    assert course[:10] == [3e-4 * (k + 1) / 10 for k in range(10)]
    assert course[0] == 3e-4 / 10
    assert course[9] == 3e-4
    assert max(course) == 3e-4


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("final", [0.0, 0.1, 0.37, 1.0])
@pytest.mark.parametrize(("total", "warmup"), [(2, 0), (2, 1), (7, 3), (100, 0), (1000, 999)])
def test_last_step_has_exactly_the_final_fraction(kind: str, final: float, total: int, warmup: int) -> None:
    assert rates(total, kind=kind, warmup_steps=warmup, final_fraction=final)[-1] == 3e-4 * final


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_starts_at_the_highest_rate_and_never_rises(kind: str) -> None:
    course = rates(200, kind=kind, final_fraction=0.1)
    assert course[0] == 3e-4
    assert all(later < earlier for earlier, later in itertools.pairwise(course))


def test_cosine_is_halfway_at_the_middle_and_follows_torch() -> None:
    course = rates(101, kind="cosine", final_fraction=0.2)
    assert course[50] == pytest.approx(3e-4 * 0.6, rel=1e-15)
    parameter = torch.nn.Parameter(torch.zeros(1))
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([parameter], lr=3e-4), 100, eta_min=6e-5)
    closed_form = reference._get_closed_form_lr  # type: ignore[attr-defined]
    for step in range(101):
        reference.last_epoch = step
        assert course[step] == pytest.approx(closed_form()[0], rel=1e-13)


def test_linear_is_a_line() -> None:
    course = rates(11, kind="linear", final_fraction=0.5)
    assert course == pytest.approx([3e-4 * (1 - 0.05 * step) for step in range(11)], rel=1e-14)


def test_constant_ignores_the_final_fraction() -> None:
    assert rates(5, kind="constant", final_fraction=0.1) == [3e-4] * 5


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_run_of_one_step_and_run_that_ends_with_its_warmup(kind: str) -> None:
    assert rates(1, kind=kind) == [3e-4]
    assert rates(1, kind=kind, warmup_steps=1) == [3e-4]
    assert rates(4, kind=kind, warmup_steps=4)[-1] == 3e-4


def test_warmup_longer_than_the_run_is_refused() -> None:
    schedule = ScheduleConfig(warmup_steps=31)
    with pytest.raises(ConfigError, match=r"schedule\.warmup_steps: the warm-up of 31 steps is longer than the run of 30"):
        check_schedule(30, schedule)
    with pytest.raises(ConfigError):
        learning_rate(0, 30, OPTIMIZER, schedule)
    check_schedule(31, schedule)


def run_config(**optimizer: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "test",
            "model": {"family": "llama"},
            "data": {"tokenizer": {"train": "bpe", "vocab_size": 300}, "sequence_length": 16},
            "optimizer": {"learning_rate": 1e-3, **optimizer},
            "schedule": {"kind": "linear", "warmup_steps": 2, "final_fraction": 0.0},
            "training": {"steps": 10, "global_batch": 4},
        }
    )


def test_hyper_counts_updates_for_the_bias_correction_and_steps_for_the_rate() -> None:
    config = run_config(betas=[0.9, 0.95])
    assert hyper(0, 0, 10, config) == Hyper(5e-4, 1 - 0.9, 1 - 0.95)
    skipped = hyper(7, 4, 10, config)  # three of seven steps were left out
    assert skipped == Hyper(learning_rate(7, 10, config.optimizer, config.schedule), 1 - 0.9**5, 1 - 0.95**5)


def test_bias_correction_without_momentum_and_after_many_updates() -> None:
    config = run_config(betas=[0.0, 0.999])
    assert hyper(0, 0, 10, config).bias_correction1 == 1.0
    late = hyper(9, 10**6, 10, config)
    assert late.bias_correction2 == 1.0
    assert math.isfinite(late.learning_rate)
