"""Speed and time left, with a clock that the test moves."""

import pytest

from dssn_jax.training.timer import StepTimer


def test_speed_and_time_left():
    now = 0.0
    timer = StepTimer(clock=lambda: now)
    now = 60.0  # The first step compiles.
    timer.count_step(waited=0.0)
    assert timer.read(steps_left=10) == (60.0, 0.0, None)
    for _ in range(4):
        now += 0.5
        timer.count_step(waited=0.1)
    timing = timer.read(steps_left=6)
    assert timing.seconds_per_step == pytest.approx(0.5)
    assert timing.waiting == pytest.approx(0.4 / 2)
    assert timing.seconds_left == pytest.approx(6 * 0.5)  # Without the first step.


def test_evaluations_count_toward_the_time_left_and_not_toward_the_speed():
    now = 0.0
    timer = StepTimer(clock=lambda: now)
    for _ in range(5):
        now += 1.0
        timer.count_step(waited=0.0)
        timer.read(steps_left=0)
    now += 10.0
    timer.count_other_work()
    now += 1.0
    timer.count_step(waited=0.5)
    timing = timer.read(steps_left=4)
    assert timing.seconds_per_step == pytest.approx(1.0) and timing.waiting == pytest.approx(0.5)
    assert timing.seconds_left == pytest.approx(4 * (1.0 + 10.0 / 6))
    assert timer.steps == 6
