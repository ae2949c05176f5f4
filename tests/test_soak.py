import random

import pytest

from tests import soak


@pytest.mark.slow
def test_a_run_does_not_grow_and_leaves_nothing():
    """`python -m tests.soak` does the same over 1000 steps."""
    assert soak.soak(steps=120)


@pytest.mark.parametrize("leaked", [0, 1])
def test_growth_is_told_from_what_is_there_for_a_moment(leaked):
    """Zero to eight threads come and go with each step; one per evaluation, or none, stays."""
    moments = random.Random(0)
    threads = {step: 40 + leaked * (step // soak.EVERY) + moments.randint(0, 8) for step in range(61, 201)}
    measured = [(step, soak.Usage(500.0, 100, count, 3, 40)) for step, count in threads.items()]
    growth = soak.slopes(measured)
    assert growth.threads == pytest.approx(1000 / soak.EVERY * leaked, abs=10)
    assert (growth.memory, growth.descriptors, growth.processes) == (0, 0, 0)
