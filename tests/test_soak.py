import pathlib

import pytest

from tests import soak


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/smaps_rollup").exists(), reason="reads /proc of Linux")
def test_a_run_does_not_grow_and_leaves_nothing():
    assert soak.soak(steps=200)
