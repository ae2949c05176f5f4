import collections
import time

import numpy as np
import pytest

from input_pipeline.errors import DataError
from input_pipeline.eval_batches import choose_buckets, eval_groups
from input_pipeline.sources.open import open_sources


class SizedSource:
    """Images whose values are their number, in three sizes by turns; counts what is read."""

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
def test_every_image_comes_once_at_its_place(buckets, shapes):
    source = SizedSource(20)
    groups = list(eval_groups(source, batch=2, buckets=buckets, threads=3))
    assert {group.images.shape[1:3] for group in groups} == shapes
    assert sorted(source.reads) == sorted(index for group in groups for index in group.indices) == list(range(20))
    for group in groups:
        assert group.names == tuple(f"{index}.png" for index in group.indices)
        for row, (height, width) in enumerate(group.sizes):
            inside = np.zeros(group.labels.shape[1:], bool)
            inside[:height, :width] = True
            index = group.indices[row] if row < len(group.indices) else 0
            assert (height, width) == (source.size(index) if row < len(group.indices) else (0, 0))
            np.testing.assert_array_equal(group.images[row], np.where(inside[..., None], index, 0).repeat(3, -1))
            np.testing.assert_array_equal(group.labels[row], np.where(inside, index + 100, 255))


def test_processes_share_each_group():
    whole = list(eval_groups(SizedSource(20), batch=4, buckets=2))
    parts = [list(eval_groups(SizedSource(20), 4, buckets=2, process_index=i, process_count=2)) for i in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for group, first, second in zip(whole, *parts, strict=True):
        assert group.indices == first.indices + second.indices
        for name in ("images", "labels", "sizes"):
            joined = np.concatenate([getattr(first, name), getattr(second, name)])
            np.testing.assert_array_equal(getattr(group, name), joined)


def test_center_crop():
    group = next(eval_groups(SizedSource(3), batch=3, buckets=1, crop=6))
    assert group.images.shape == (3, 6, 6, 3)
    np.testing.assert_array_equal(group.sizes, [(6, 6), (5, 5), (6, 6)])


def test_buckets_join_what_adds_the_fewest_pixels():
    sizes = [(10, 20)] * 8 + [(20, 10)] * 8 + [(10, 19)] * 4 + [(19, 10)] * 4
    expected = {(10, 20): (10, 20), (10, 19): (10, 20), (20, 10): (20, 10), (19, 10): (20, 10)}
    assert choose_buckets(sizes, 4, 2) == expected
    # Two sizes of one image each fill one batch together: a second program would only cost.
    assert set(choose_buckets([(8, 8), (8, 9)], 4, 2).values()) == {(8, 9)}


def test_buckets_of_thousands_of_sizes():
    rng = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in rng.integers(200, 640, (3000, 2))]
    buckets = choose_buckets(sizes, 8, 4)
    assert len(set(buckets.values())) <= 4
    assert all(height <= buckets[height, width][0] and width <= buckets[height, width][1] for height, width in sizes)
    counts = collections.Counter(buckets[size] for size in sizes)
    padded = sum(h * w * images for (h, w), images in counts.items())
    assert padded < 0.8 * 640 * 640 * len(sizes)  # One bucket would take it all.


def test_reads_a_bounded_number_ahead():
    source = SizedSource(300)
    groups = eval_groups(source, batch=4, threads=3, ahead=2)
    next(groups)
    time.sleep(0.3)
    groups.close()
    assert 4 <= len(source.reads) <= 4 * 3


def test_errors_are_raised_or_told():
    with pytest.raises(DataError, match=r"7\.png"):
        list(eval_groups(SizedSource(20, broken=(7,)), batch=4))
    told = {}
    groups = list(eval_groups(SizedSource(20, broken=(7, 19)), batch=4, on_error=told.setdefault))
    assert set(told) == {7, 19} and "7.png" in str(told[7])
    assert {index for group in groups for index in group.indices} == set(range(20)) - {7, 19}


def test_damaged_files_of_a_folder_are_named(folder, config):
    sources = open_sources(config)
    (folder / "images/11.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"images/11\.png"):
        list(eval_groups(sources.val, batch=1))
