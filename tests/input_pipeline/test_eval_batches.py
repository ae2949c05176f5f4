import collections
import time

import numpy as np
import pytest

from input_pipeline.errors import DataError
from input_pipeline.eval_batches import EvalOptions, choose_buckets, eval_batches, padded_sizes
from input_pipeline.sources.open import open_source


class SizedSource:
    """Images whose values are their index, in three alternating sizes; records the reads."""

    sizes = ((6, 8), (5, 5), (6, 7))

    def __init__(self, images, broken=()):
        self.images, self.broken, self.reads = images, broken, []

    def __len__(self):
        return self.images

    def size(self, index):
        return self.sizes[index % 3]

    def name(self, index):
        return f"{index}.png"

    def __getitem__(self, index):
        self.reads.append(index)
        if index in self.broken:
            raise DataError(f"{index}.png: damaged")
        image = np.full((*self.size(index), 3), index, np.uint8)
        return {"image": image, "label": image[..., 0] + 100}


@pytest.mark.parametrize(("buckets", "shapes"), [(1, {(6, 8)}), (2, {(6, 8), (5, 5)}), (3, {(6, 8), (5, 5), (6, 7)})])
def test_every_image_is_in_one_row_with_its_label(buckets, shapes):
    source = SizedSource(20)
    batches = list(eval_batches(source, EvalOptions(batch=2, buckets=buckets, threads=3)))
    assert {batch.images.shape[1:3] for batch in batches} == shapes
    assert sorted(source.reads) == sorted(index for batch in batches for index in batch.indices) == list(range(20))
    for batch in batches:
        _assert_rows_hold_their_images(batch, source)


def _assert_rows_hold_their_images(batch, source):
    for row, (height, width) in enumerate(batch.sizes):
        inside = np.zeros(batch.labels.shape[1:], bool)
        inside[:height, :width] = True
        index = batch.indices[row] if row < len(batch.indices) else 0
        assert (height, width) == (source.size(index) if row < len(batch.indices) else (0, 0))
        np.testing.assert_array_equal(batch.images[row], np.where(inside[..., None], index, 0).repeat(3, -1))
        np.testing.assert_array_equal(batch.labels[row], np.where(inside, index + 100, 255))


def test_equal_sizes_are_not_padded():
    source = SizedSource(20)
    options = EvalOptions(batch=2, buckets=1, equal_sizes=True)
    batches = list(eval_batches(source, options))
    assert sorted(index for batch in batches for index in batch.indices) == list(range(20))
    for batch in batches:
        _assert_rows_hold_their_images(batch, source)
        assert {batch.images.shape[1:3]} == {source.size(index) for index in batch.indices}
    cropped = padded_sizes(source, options._replace(crop=6), indices=(4, 0, 2))
    assert cropped == {4: (5, 5), 0: (6, 6), 2: (6, 6)}


def test_processes_share_each_batch():
    options = EvalOptions(batch=4, buckets=2)
    whole = list(eval_batches(SizedSource(20), options))
    shares = [
        list(eval_batches(SizedSource(20), options._replace(process_index=index, process_count=2))) for index in (0, 1)
    ]
    assert len(whole) == len(shares[0]) == len(shares[1])
    for batch, first, second in zip(whole, *shares, strict=True):
        assert batch.indices == first.indices + second.indices
        for name in ("images", "labels", "sizes"):
            joined = np.concatenate([getattr(first, name), getattr(second, name)])
            np.testing.assert_array_equal(getattr(batch, name), joined)


def test_center_crop():
    batch = next(eval_batches(SizedSource(3), EvalOptions(batch=3, buckets=1, crop=6)))
    assert batch.images.shape == (3, 6, 6, 3)
    np.testing.assert_array_equal(batch.sizes, [(6, 6), (5, 5), (6, 6)])


def test_chosen_indices():
    batches = list(eval_batches(SizedSource(20), EvalOptions(batch=4, buckets=1), indices=(7, 3)))
    assert [batch.indices for batch in batches] == [(7, 3)]


def test_buckets_join_what_adds_the_fewest_pixels():
    sizes = [(10, 20)] * 8 + [(20, 10)] * 8 + [(10, 19)] * 4 + [(19, 10)] * 4
    expected = {(10, 20): (10, 20), (10, 19): (10, 20), (20, 10): (20, 10), (19, 10): (20, 10)}
    assert choose_buckets(sizes, EvalOptions(batch=4, buckets=2)) == expected
    # Two sizes of one image each fill one batch together: a second program would only cost.
    assert set(choose_buckets([(8, 8), (8, 9)], EvalOptions(batch=4, buckets=2)).values()) == {(8, 9)}


def test_buckets_of_thousands_of_sizes():
    rng = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in rng.integers(200, 640, (3000, 2))]
    buckets = choose_buckets(sizes, EvalOptions(batch=8))
    assert len(set(buckets.values())) <= 4
    assert all(height <= buckets[height, width][0] and width <= buckets[height, width][1] for height, width in sizes)
    counts = collections.Counter(buckets[size] for size in sizes)
    padded = sum(h * w * images for (h, w), images in counts.items())
    assert padded < 0.8 * 640 * 640 * len(sizes)  # One bucket would take it all.


def test_reads_a_bounded_number_ahead():
    source = SizedSource(300)
    batches = eval_batches(source, EvalOptions(batch=4, threads=3), ahead=2)
    next(batches)
    time.sleep(0.3)
    batches.close()
    assert 4 <= len(source.reads) <= 4 * 3


def test_errors_are_raised_or_reported():
    options = EvalOptions(batch=4)
    with pytest.raises(DataError, match=r"7\.png"):
        list(eval_batches(SizedSource(20, broken=(7,)), options))
    errors = {}
    batches = list(eval_batches(SizedSource(20, broken=(7, 19)), options, on_error=errors.setdefault))
    assert set(errors) == {7, 19} and "7.png" in str(errors[7])
    assert {index for batch in batches for index in batch.indices} == set(range(20)) - {7, 19}


def test_damaged_files_of_a_folder_are_named(folder, config):
    source = open_source(config, "val")
    (folder / "images/11.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"images/11\.png"):
        list(eval_batches(source, EvalOptions(batch=1)))


def test_batches_of_large_images_have_fewer_rows():
    """Batches hold at most `pixels` per device; larger images have a device for themselves, and enlarge no others."""
    sizes = [(10, 10)] * 9 + [(20, 20)] * 3 + [(10, 39), (39, 10)] + [(100, 100), (99, 100), (400, 300)]
    source = SizedSource(len(sizes))
    source.size = sizes.__getitem__
    options = EvalOptions(batch=8, buckets=1, devices=2, pixels=400, process_count=2)
    batches = [list(eval_batches(source, options._replace(process_index=index))) for index in (0, 1)]
    for first, second in zip(*batches, strict=True):
        rows, *size = first.images.shape[:3]
        assert second.images.shape == first.images.shape and rows == options.rows(tuple(size)) / 2
        assert rows == 1 or rows * size[0] * size[1] <= 400
        for batch in (first, second):
            assert [sizes[index] for index in batch.indices] == [*map(tuple, batch.sizes[: len(batch.indices)])]
    padded = {index: batch.images.shape[1:3] for each in batches for batch in each for index in batch.indices}
    assert sorted(padded) == list(range(len(sizes)))
    assert padded[12] == (10, 39) and padded[13] == (39, 10)  # Their union would be large.
    assert padded[14] == padded[15] == (100, 100) and padded[16] == (400, 300)
    assert len({*padded.values()}) == 5


def test_a_record_that_memory_cannot_hold_is_an_error_of_its_own():
    class Source(SizedSource):
        def __getitem__(self, index):
            if index == 3:
                raise MemoryError
            return super().__getitem__(index)

    errors = {}
    batches = list(eval_batches(Source(6), EvalOptions(batch=2), on_error=errors.setdefault))
    assert sorted(index for batch in batches for index in batch.indices) == [0, 1, 2, 4, 5]
    assert str(errors[3]) == "3.png: needs more memory than there is"
