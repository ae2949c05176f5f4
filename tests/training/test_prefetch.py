"""The thread that moves batches to the devices."""

import threading
import time

import jax
import numpy as np
import pytest

from dssn_jax import sharding
from dssn_jax.training.prefetch import DevicePrefetcher
from input_pipeline.batch import Batch
from input_pipeline.errors import DataError


@pytest.fixture
def prefetch():
    """Returns a function that makes a prefetcher over batches, and closes all."""
    made = []

    def make(batches):
        made.append(DevicePrefetcher(iter(batches), sharding.make_mesh(jax.devices()[:2])))
        return made[-1]

    yield make
    for prefetcher in made:
        prefetcher.close()


def batch(number):
    return Batch(np.full((2, 3, 3, 3), number, np.uint8), np.full((2, 3, 3), number, np.uint8))


def test_batches_come_in_order_and_one_ahead(prefetch):
    drawn = []

    def batches():
        for number in range(4):
            drawn.append(number)
            yield batch(number)

    prefetcher = prefetch(batches())
    assert drawn == []
    for number in range(2):
        taken, _ = prefetcher.take(running=[])
        assert len(taken.image_x.sharding.device_set) == 2 and taken.image_u is None
        np.testing.assert_array_equal(taken.label_x, batch(number).label_x)
        assert drawn == list(range(number + 1))  # Nothing is read ahead unless it was started.
    prefetcher.start()
    prefetcher.start()  # Does nothing more.
    prefetcher._next.result()
    assert drawn == [0, 1, 2]
    for number in (2, 3):
        taken, _ = prefetcher.take(running=[])
        np.testing.assert_array_equal(taken.label_x, batch(number).label_x)


def test_an_error_of_the_thread_is_raised_where_the_batch_is_taken(prefetch):
    def batches():
        yield batch(0)
        raise DataError("a.png: damaged")

    prefetcher = prefetch(batches())
    prefetcher.take(running=[])
    prefetcher.start()
    with pytest.raises(DataError, match=r"a.png: damaged"):
        prefetcher.take(running=[])


def test_idle_time_is_that_after_the_last_step(prefetch):
    """The devices are idle from the end of the running steps until the batch is there, not before."""
    release = threading.Event()

    def batches():
        for number in range(2):
            release.wait()
            yield batch(number)

    class Step:
        """A result that is ready after a while, and then lets the batch come a while later."""

        def block_until_ready(self):
            time.sleep(0.2)
            threading.Timer(0.1, release.set).start()
            return self

    prefetcher = prefetch(batches())
    _, idle = prefetcher.take(running=[Step()])
    assert 0.05 < idle < 0.2
    prefetcher.start()
    prefetcher._next.result()
    _, idle = prefetcher.take(running=[Step()])
    assert idle == 0


def test_closing_waits_for_the_thread(prefetch):
    prefetcher = prefetch(batch(number) for number in range(2))
    prefetcher.start()
    prefetcher.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
