import pytest

from tests import faults


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_is_left_alone():
    assert faults.compare(kills=2, steps=20, seed=0)
