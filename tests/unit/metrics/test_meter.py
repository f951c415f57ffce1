from __future__ import annotations

import pytest

from jaxllm.metrics.meter import Meter, Throughput


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def steps(meter: Meter, clock: Clock, count: int, seconds: float, tokens: int = 100) -> None:
    for _ in range(count):
        clock.now += seconds
        meter.step(tokens)


def test_the_compiling_step_is_left_out(clock: Clock) -> None:
    meter = Meter(100, 0, flops_per_token=1e9, peak_flops=None, clock=clock)
    steps(meter, clock, 1, 60.0)
    steps(meter, clock, 9, 0.5)
    assert meter.lap() == Throughput(pytest.approx(200.0), pytest.approx(0.2), None)


def test_an_interval_of_only_the_compiling_step_has_no_rate(clock: Clock) -> None:
    meter = Meter(100, 0, 1e9, 1e12, clock)
    steps(meter, clock, 1, 60.0)
    clock.now += 1.0
    assert meter.lap() == Throughput(None, None, None)
    assert meter.seconds_left is None
    steps(meter, clock, 1, 0.5)
    assert meter.lap().tokens_per_second == pytest.approx(200.0)


def test_waiting_for_the_first_step_before_the_lap_is_left_out_too(clock: Clock) -> None:
    meter = Meter(100, 0, 1e9, None, clock)
    steps(meter, clock, 1, 60.0)
    clock.now += 5.0  # the device still computes; the caller waits for it, then reads
    meter.lap()
    steps(meter, clock, 10, 0.5)
    assert meter.lap().tokens_per_second == pytest.approx(200.0)


def test_pauses_are_left_out_of_the_rate_but_not_of_the_time(clock: Clock) -> None:
    meter = Meter(100, 0, 1e9, None, clock)
    steps(meter, clock, 1, 1.0)
    steps(meter, clock, 5, 0.5)
    with meter.pause():
        clock.now += 30.0
    steps(meter, clock, 5, 0.5)
    assert meter.lap().tokens_per_second == pytest.approx(200.0)
    assert meter.seconds == pytest.approx(36.0)


def test_a_pause_that_fails_still_ends(clock: Clock) -> None:
    meter = Meter(100, 0, 1e9, None, clock)
    steps(meter, clock, 1, 1.0)
    pause = meter.pause()
    pause.__enter__()
    clock.now += 30.0
    error = OSError("disk full")
    assert not pause.__exit__(OSError, error, None)
    steps(meter, clock, 2, 0.5)
    assert meter.lap().tokens_per_second == pytest.approx(200.0)


def test_intervals_are_measured_one_by_one(clock: Clock) -> None:
    meter = Meter(100, 0, 1e9, None, clock)
    steps(meter, clock, 1, 1.0)
    steps(meter, clock, 10, 0.5)
    assert meter.lap().tokens_per_second == pytest.approx(200.0)
    steps(meter, clock, 10, 0.25)
    assert meter.lap().tokens_per_second == pytest.approx(400.0)
    assert meter.lap() == Throughput(None, None, None)


def test_utilisation_is_model_flops_over_the_peak(clock: Clock) -> None:
    meter = Meter(100, 0, flops_per_token=2e9, peak_flops=1e12, clock=clock)
    steps(meter, clock, 1, 1.0)
    steps(meter, clock, 10, 0.5)
    assert meter.lap() == Throughput(pytest.approx(200.0), pytest.approx(0.4), pytest.approx(0.4))


def test_time_left_counts_pauses_in_their_share_and_starts_at_the_resumed_step(clock: Clock) -> None:
    meter = Meter(100, 60, 1e9, None, clock)
    steps(meter, clock, 1, 20.0)
    steps(meter, clock, 10, 0.5)
    with meter.pause():
        clock.now += 5.0
    meter.lap()
    # 71 steps are done; 10 of them took 5 s and there was a pause of 5 s, so each of the 29 left is expected to take 1 s.
    assert meter.seconds_left == pytest.approx(29.0)
    steps(meter, clock, 29, 0.5)
    assert meter.seconds_left == 0.0
