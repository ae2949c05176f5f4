"""Batches: their content, order, independence of threads and workers, and resumption."""

import itertools
import json
import time

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from configs import methods
from input_pipeline.batch import Batch, labeled_rows
from input_pipeline.class_names import SHAPES_CLASSES
from input_pipeline.errors import DataError
from input_pipeline.pipeline import run_length, train_dataset, train_iterator
from input_pipeline.sources.open import Sources, open_sources


class CountingSource:
    """Images whose red channel is their index; records the reads."""

    def __init__(self, images, labeled, size=8):
        self.images, self.labeled, self.side, self.reads = images, labeled, size, []

    def __len__(self):
        return self.images

    def label(self, index):
        return self[index]["label"]

    def __getitem__(self, index):
        self.reads.append(index)
        image = np.full((self.side, self.side, 3), (index, 7, 7), np.uint8)
        return {"image": image, "label": image[..., 0] % 3} if self.labeled else {"image": image}


def _sources(labeled=3, unlabeled=10):
    return Sources(CountingSource(labeled, True), CountingSource(unlabeled, False), CountingSource(2, True))


def _numbers(batches, field):
    """Returns the indices of the images in a list of batches."""
    return np.concatenate([getattr(batch, field)[:, 0, 0, 0] for batch in batches])


def _assert_equal(batch, other):
    assert type(batch) is type(other) is Batch
    for name, values, expected in zip(Batch._fields, batch, other, strict=True):
        assert (values is None) == (expected is None), name
        np.testing.assert_array_equal(values, expected, err_msg=name)


def _randomized(config):
    config.data.scale, config.data.flip = (0.5, 2.0), 0.5
    return config


def test_batch_arrays(folder, config):
    batch = train_dataset(open_sources(config), _randomized(config))[0]
    assert {
        name: (values.shape, values.dtype.name) for name, values in batch._asdict().items() if values is not None
    } == {
        "image_x": ((2, 16, 16, 3), "uint8"),
        "label_x": ((2, 16, 16), "uint8"),
        "image_u": ((4, 16, 16, 3), "uint8"),
        "valid_u": ((4, 16, 16), "bool"),
        "image_m": ((4, 16, 16, 3), "uint8"),
        "valid_m": ((4, 16, 16), "bool"),
        "boxes": ((4, 2, 4), "int32"),
    }


@pytest.mark.parametrize(
    ("strong", "feature", "fields"),
    [(0, 0, ""), (0, 1, "image_u valid_u"), (1, 0, "image_u valid_u image_m valid_m boxes")],
)
def test_only_what_the_method_needs(config, strong, feature, fields):
    config.method.strong_views, config.method.feature_views = strong, feature
    sources = _sources()
    batch = train_dataset(sources, config)[0]
    present = [name for name, values in batch._asdict().items() if values is not None]
    assert present == ["image_x", "label_x", *fields.split()]
    assert batch.boxes is None or batch.boxes.shape == (4, strong, 4)
    assert len(sources.unlabeled.reads) == (4 if fields else 0)  # "same" decodes each image once.


def test_supervised_has_twice_the_labeled_images(config):
    methods.apply(config, "supervised")
    sources = _sources()
    assert labeled_rows(config) == len(train_dataset(sources, config)[0].image_x) == 4
    assert len(train_dataset(sources, config, 1, 4)[0].image_x) == 1
    assert sources.unlabeled.reads == []


def test_run_length(config):
    config.train.epochs = 3
    assert run_length(_sources(unlabeled=10), config) == (6, 2)
    config.train.steps = 5
    assert run_length(_sources(unlabeled=10), config) == (5, 2)


def test_rare_classes_come_up(config):
    """Images of class 2 are 1 of 10: with their probability instead of a tenth, as partners too."""
    config.data.update({"labeled_sampling": "rare", "rare_temperature": 0.5, "labeled_batch": 8})
    config.views.mix_partner = "labeled"
    sources = _sources(labeled=10)._replace(labeled=_Uneven(10))
    dataset = train_dataset(sources, config)
    batches = [dataset[step] for step in range(40)]
    frequencies = np.array([6, 3, 1]) / 10
    p = np.exp((1 - frequencies) / 0.5) / np.exp((1 - frequencies) / 0.5).sum()
    for image, label in (("image_x", "label_x"), ("image_m", "label_m")):
        numbers = _numbers(batches, image)
        labels = np.concatenate([getattr(batch, label)[:, 0, 0] for batch in batches])
        np.testing.assert_array_equal(labels, _Uneven.CLASSES[numbers])
        np.testing.assert_allclose(np.bincount(labels, minlength=3) / len(labels), p, atol=0.1)
        assert len(set(numbers[labels == 0])) == 6
    config.data.class_pixels = (6, 3, 1)  # Counted before: the same.
    _assert_equal(train_dataset(sources, config)[7], batches[7])
    config.data.class_pixels = (1, 3, 6)
    labels = np.concatenate([train_dataset(sources, config)[step].label_x[:, 0, 0] for step in range(10)])
    assert (labels == 0).mean() > p[0] + 0.1


def test_pasted_classes_are_in_the_crop_and_rare(config):
    """Two of the classes in the crop, drawn for each view, or the only one; never the ignored padding."""
    config.data.update({"source": "shapes", "classes": SHAPES_CLASSES, "crop": 48, "rare_temperature": 0.2})
    config.views.update({"mix_partner": "labeled", "paste_classes": 2})
    sources = open_sources(config)
    dataset = train_dataset(sources, config)
    batches = [dataset[step] for step in range(20)]
    labels, drawn = (np.concatenate([getattr(batch, key) for batch in batches]) for key in ("label_m", "classes"))
    present = np.stack([np.bincount(label.ravel(), minlength=256)[:6] > 0 for label in labels])
    assert drawn.shape == (80, 2, 6) and drawn.dtype == bool
    assert not (drawn & ~present[:, None]).any()
    np.testing.assert_array_equal(drawn.sum(-1), np.minimum(present.sum(-1), 2)[:, None].repeat(2, 1))
    several = present.sum(-1) > 2
    assert (drawn[several, 0] != drawn[several, 1]).any()
    # The background, in almost every crop, is drawn last.
    shares = drawn.sum((0, 1)) / (2 * present.sum(0))
    assert shares[0] == min(shares)


class _Uneven(CountingSource):
    """Images of one class each."""

    CLASSES = np.array([0, 0, 0, 1, 0, 1, 1, 2, 0, 0])

    def __init__(self, images):
        super().__init__(images, labeled=True)

    def __getitem__(self, index):
        record = super().__getitem__(index)
        return record | {"label": np.full_like(record["label"], self.CLASSES[index])}


def test_labels_belong_to_their_images(config):
    batch = train_dataset(_sources(), config)[0]
    size = slice(0, 8)  # The crop of 16 pads the images of 8.
    np.testing.assert_array_equal(batch.image_x[:, size, size, 0] % 3, batch.label_x[:, size, size])
    assert (batch.label_x[:, 8:] == 255).all() and (batch.label_x[:, :, 8:] == 255).all()
    assert batch.valid_u.sum() == 4 * 64


def test_unlabeled_epochs(config):
    """Each image at most once per epoch, 8 of 10 with batches of 4, in a new order every time."""
    dataset = train_dataset(_sources(unlabeled=10), config)
    epochs = [tuple(_numbers([dataset[2 * e], dataset[2 * e + 1]], "image_u")) for e in range(20)]
    assert all(len(set(numbers)) == 8 for numbers in epochs)
    assert len(set(epochs)) == 20
    counts = np.bincount(np.concatenate(epochs), minlength=10)
    assert counts.min() >= 10  # The two that are left out change: 16 expected for each.


def test_labeled_counts(config):
    """2 steps of 4 over 3 images: each 2 or 3 times per epoch, and equally often over 3 epochs."""
    config.data.labeled_batch = 4
    dataset = train_dataset(_sources(labeled=3), config)
    epochs = [_numbers([dataset[2 * e], dataset[2 * e + 1]], "image_x") for e in range(9)]
    counts = np.array([np.bincount(numbers, minlength=3) for numbers in epochs])
    assert set(counts.ravel()) == {2, 3}
    np.testing.assert_array_equal(counts.reshape(3, 3, 3).sum(1), 8)
    assert len({tuple(numbers) for numbers in epochs}) > 5


def test_more_labeled_than_an_epoch_takes(config):
    """9 images, 4 per epoch: each 0 or 1 times, and equally often over 9 epochs."""
    dataset = train_dataset(_sources(labeled=9, unlabeled=8), config)
    epochs = [_numbers([dataset[2 * e], dataset[2 * e + 1]], "image_x") for e in range(9)]
    assert all(len(set(numbers)) == 4 for numbers in epochs)
    np.testing.assert_array_equal(np.bincount(np.concatenate(epochs), minlength=9), 4)


def test_streams_have_their_own_orders(config):
    """With as many labeled as unlabeled images, neither stream follows the other, in any pair of near epochs."""
    config.data.labeled_batch = config.data.unlabeled_batch
    dataset = train_dataset(_sources(labeled=40, unlabeled=40), config)
    epochs = [[dataset[10 * e + s] for s in range(10)] for e in range(4)]
    for first, second in itertools.product(epochs, repeat=2):
        assert (_numbers(first, "image_x") == _numbers(second, "image_u")).mean() < 0.3


@pytest.mark.parametrize("seed", [1, 2])
def test_seed_changes_everything(config, seed):
    batches = []
    for config.seed in (seed, seed + 1):
        dataset = train_dataset(_sources(labeled=50, unlabeled=50), config)
        batches.append([dataset[step] for step in range(10)])
    for key in ("image_x", "image_u"):
        assert (_numbers(batches[0], key) == _numbers(batches[1], key)).mean() < 0.3
    boxes = [np.concatenate([batch.boxes for batch in some]) for some in batches]
    assert (boxes[0] != boxes[1]).any((1, 2)).mean() > 0.5


def test_partner_same(config):
    """Another crop of the same image, and another box for each view."""
    config.data.source, config.data.classes, config.data.crop = "shapes", SHAPES_CLASSES, 48
    config.data.shapes.unlabeled = 32
    sources = open_sources(config)
    originals = np.array([sources.unlabeled[i]["image"] for i in range(32)])
    batch = train_dataset(sources, config)[0]
    for view, partner in zip(batch.image_u, batch.image_m, strict=True):
        windows = [_window(originals, crop) for crop in (view, partner)]
        assert windows[0][0] == windows[1][0] and windows[0][1:] != windows[1][1:]
    assert (batch.boxes[:, 0] != batch.boxes[:, 1]).any()


def _window(originals, crop):
    """Returns (image, y, x) of the only window of `originals` that equals `crop`."""
    side, places = len(crop), originals.shape[1] - len(crop) + 1
    candidates = np.argwhere((originals[:, :places, :places] == crop[0, 0]).all(-1))
    equal = [p for p in candidates if (originals[p[0], p[1] : p[1] + side, p[2] : p[2] + side] == crop).all()]
    assert len(equal) == 1
    return tuple(equal[0])


@pytest.mark.parametrize("images", [2, 9, 10])
def test_partner_other(config, images):
    """Never the image itself; each image is a partner once per epoch."""
    config.views.mix_partner = "other"
    config.data.unlabeled_batch = images
    dataset = train_dataset(_sources(unlabeled=images), config)
    pairs = [np.stack([_numbers([dataset[e]], key) for key in ("image_u", "image_m")], 1) for e in range(12)]
    for epoch in pairs:
        assert (epoch[:, 0] != epoch[:, 1]).all()
        assert sorted(epoch[:, 0]) == sorted(epoch[:, 1]) == list(range(images))
    kinds = {tuple(pair) for epoch in pairs for pair in epoch}
    assert len(kinds) > 0.5 * images * (images - 1)  # The pairs change.


def test_partner_reversed_reads_no_partner(config):
    config.views.mix_partner = "reversed"
    sources = _sources()
    batch = train_dataset(sources, config)[0]
    assert batch.image_m is None and batch.valid_m is None and batch.boxes.shape == (4, 2, 4)
    assert len(sources.unlabeled.reads) == 4


def test_partner_labeled_brings_its_labels(config):
    config.views.mix_partner = "labeled"
    sources = _sources(labeled=5)
    batches = [train_dataset(sources, config)[step] for step in range(20)]
    assert all(batch.valid_m is None and batch.boxes.shape == (4, 2, 4) for batch in batches)
    images, labels = (np.concatenate([getattr(batch, key) for batch in batches]) for key in ("image_m", "label_m"))
    np.testing.assert_array_equal(images[:, :8, :8, 0] % 3, labels[:, :8, :8])
    assert (labels[:, 8:] == 255).all() and (labels[:, :, 8:] == 255).all()
    counts = np.bincount(images[:, 0, 0, 0], minlength=5)
    assert len(counts) == 5 and counts.min() >= 5  # 16 expected of each.


def test_partner_errors(config):
    config.data.unlabeled_batch = 1
    config.views.mix_partner = "other"
    with pytest.raises(DataError, match="needs at least 2 unlabeled images"):
        train_dataset(_sources(unlabeled=1), config)
    config.views.mix_partner = "another"
    with pytest.raises(DataError, match="mix_partner is 'another'; known: same, other, reversed, labeled"):
        train_dataset(_sources(), config)


def test_batch_errors(config):
    with pytest.raises(DataError, match="3 unlabeled images are fewer than one batch of 4"):
        train_dataset(_sources(unlabeled=3), config)
    with pytest.raises(DataError, match=r"labeled_batch: 2 images per step; expected a multiple of the 4 processes"):
        train_dataset(_sources(), config, 0, 4)


@pytest.mark.parametrize(("partner", "sampling"), [("same", "uniform"), ("labeled", "uniform"), ("labeled", "rare")])
@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_global_batch(folder, config, process_count, partner, sampling):
    config.data.labeled_batch, config.views.mix_partner, config.data.labeled_sampling = 4, partner, sampling
    config.views.paste_classes = int(partner == "labeled")
    sources, config = open_sources(config), _randomized(config)
    whole = train_dataset(sources, config)
    shares = [train_dataset(sources, config, index, process_count) for index in range(process_count)]
    for step in (0, 1, 5):
        rows = [share[step] for share in shares]
        _assert_equal(whole[step], jax.tree.map(lambda *parts: np.concatenate(parts), *rows))


def test_change_of_config_does_not_reach_a_running_pipeline(config):
    dataset = train_dataset(_sources(), config)
    config.data.crop = 4
    assert dataset[0].image_x.shape[1] == 16


def _take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


@pytest.mark.parametrize(
    ("workers", "threads", "buffer"), [(0, 1, 1), (0, 4, 3), pytest.param(1, 2, 1, marks=pytest.mark.slow), (2, 2, 2)]
)
def test_batches_do_not_depend_on_threads_and_workers(folder, config, workers, threads, buffer):
    """Against the batches made one by one, across the end of an epoch (2 steps)."""
    config = _randomized(config)
    config.views.mix_partner = "same" if threads == 1 else "labeled"
    config.data.labeled_sampling = "uniform" if threads == 1 else "rare"
    expected = train_dataset(open_sources(config), config)
    config.data.workers, config.data.threads, config.data.buffer = workers, threads, buffer
    batches = _take(train_iterator(train_dataset(open_sources(config), config), config), 5)
    for step, batch in enumerate(batches):
        _assert_equal(batch, expected[step])


@pytest.mark.slow
def test_workers_keep_fields_that_are_none(config):
    methods.apply(config, "supervised")
    config.data.workers = 2
    dataset = train_dataset(_sources(), config)
    for step, batch in enumerate(_take(train_iterator(dataset, config), 3)):
        _assert_equal(batch, dataset[step])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resume(folder, config, workers):
    """An iterator restored from a state (as JSON) continues with the following batches."""
    config = _randomized(config)
    config.data.workers = workers
    dataset = train_dataset(open_sources(config), config)
    iterator = train_iterator(dataset, config)
    for _ in range(3):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    assert state == {"step": 3}
    iterator.close()
    restored = train_iterator(dataset, config)
    if not workers:
        next(restored)  # It may have started; with workers the test would only be slower, because they restart.
    restored.set_state(state)
    assert restored.get_state() == state
    for step, batch in enumerate(_take(restored, 3), start=3):
        _assert_equal(batch, dataset[step])


def test_state_counts_consumed_batches(config):
    iterator = train_iterator(train_dataset(_sources(), config), config)
    assert iterator.get_state() == {"step": 0}
    next(iterator)
    assert iterator.get_state() == {"step": 1}
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_errors_reach_the_consumer(folder, config, workers):
    config.data.workers = workers
    dataset = train_dataset(open_sources(config), config)
    png = (folder / "images/4.png").read_bytes()
    (folder / "images/4.png").write_bytes(png[: len(png) * 2 // 3])
    iterator = train_iterator(dataset, config)
    with pytest.raises(DataError, match=r"images/4\.png: damaged image"):
        list(itertools.islice(iterator, 20))  # Ten epochs, because some leave the image out.
    if not workers:
        _assert_continues_where_it_failed(folder, iterator, dataset, png)
    iterator.close()


def _assert_continues_where_it_failed(folder, iterator, dataset, png):
    state = iterator.get_state()
    with pytest.raises(DataError, match=r"images/4\.png: damaged image"):
        next(iterator)  # The step is not skipped ...
    (folder / "images/4.png").write_bytes(png)
    _assert_equal(next(iterator), dataset[state["step"]])  # ... and succeeds once the file is repaired.


def test_mask_errors_reach_the_consumer(folder, config):
    Image.fromarray(np.full((16, 16), 200, np.uint8)).save(folder / "masks/1.png")
    iterator = train_iterator(train_dataset(open_sources(config), config), config)
    with pytest.raises(DataError, match=r"masks/1\.png: mask values 200 found"):
        _take(iterator, 20)


def test_makes_a_bounded_number_ahead(config):
    """At most `buffer` batches beyond those taken."""
    config.data.buffer = 2
    sources = _sources(unlabeled=100)
    iterator = train_iterator(train_dataset(sources, config), config)
    next(iterator)
    time.sleep(0.3)
    assert len(sources.unlabeled.reads) <= (1 + 2) * 4
    iterator.close()


def test_iterator_is_checkpointable_by_orbax(config, tmp_path):
    dataset = train_dataset(_sources(), config)
    iterator = train_iterator(dataset, config)
    for _ in range(3):
        next(iterator)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = next(iterator)
        restored = train_iterator(dataset, config)
        manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
    _assert_equal(next(restored), expected)
    iterator.close()
    restored.close()
