import pytest

from tests import soak


@pytest.mark.slow
def test_a_run_does_not_grow_and_leaves_nothing():
    """`python -m tests.soak` does the same over 1000 steps."""
    assert soak.soak(steps=200)
