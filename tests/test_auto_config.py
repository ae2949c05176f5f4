"""Values that are 0 in a configuration: against numbers worked out by hand."""

import jax
import pytest

from configs import camvid, cityscapes, coco, custom, methods, pascal, shapes
from dssn_jax import auto_config as automatic
from dssn_jax import models
from dssn_jax import validate as config
from dssn_jax.workdir import restore as saved_run
from input_pipeline.sources.open import Sources
from tests.input_pipeline.own_images import make_root

GIB = 1 << 30


class Sizes:
    """A source of images of given sizes."""

    def __init__(self, *sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return self.sizes[index]


@pytest.fixture
def configure(tmp_path):
    root = make_root(tmp_path / "root", {"a": (0,), "b": (1,)})
    return lambda **values: custom.get_config(",".join(f"{k}={v}" for k, v in {"root": root, **values}.items()))


@pytest.fixture
def choose(monkeypatch):
    """Chooses for so many bytes a device, devices and sources (labeled, unlabeled)."""

    def run(config, labeled, unlabeled, devices=1, limit=1000 * GIB, val=None):
        monkeypatch.setattr(automatic, "memory_of", lambda devices: limit)
        return automatic.choose(config, Sources(labeled, unlabeled, val or Sizes((8, 8))), jax.devices()[:1] * devices)

    return run


@pytest.mark.parametrize(
    ("sizes", "crop"),
    [
        # The last counts twice. Short sides 360, 360, 480, 480: 360 is nearest to 22 * 16 + 1 = 353.
        ([(360, 480), (480, 360), (500, 480)], 353),
        ([(100, 30), (30, 30)], 33),
        ([(25, 25)], 33),  # 25 is 1.5 * 16 + 1: to the even 2.
        ([(3, 900)], 17),
        ([(2000, 3000)] * 3, 513),
        ([(40, 40), (40, 40), (400, 400)], 33),  # Of an even number the lower of both in the middle.
    ],
)
def test_crop(configure, choose, sizes, crop):
    found, reasons = choose(configure(), Sizes(*sizes[:1]), Sizes(*sizes[1:], sizes[-1]))
    assert found.data.crop == crop and any(f"data.crop={crop}: the median short side" in line for line in reasons)


def many(count):
    return Sizes(*[(64, 64)] * count)


@pytest.mark.parametrize(
    ("method", "gib", "devices", "unlabeled", "batches", "reason"),
    [
        ("dssn", 1000, 1, 100, (8, 8), "the recipes' 8"),
        ("dssn", 1000, 4, 100, (8, 8), "the recipes' 8"),
        ("dssn", 1000, 16, 100, (16, 16), "a multiple of 16 devices"),
        ("dssn", 1000, 3, 100, (6, 6), "a multiple of 3 devices"),
        ("dssn", 1000, 1, 5, (8, 5), "there are 5 unlabeled images"),
        ("supervised", 1000, 1, 100, (16, 8), "the recipes' 16"),
        # resnet50 at crop 257: (4 GiB - 692 MiB) / (9946 bytes * 66049) = 5.43 images: 2 + 2.
        ("dssn", 4, 1, 100, (2, 2), "2 fit 4.0 GiB a device at crop 257 with resnet50"),
        ("supervised", 4, 1, 100, (5, 2), "5 fit"),
        ("dssn", 4, 2, 100, (4, 4), "5 fit"),  # Ten images on two devices.
        ("dssn", 1, 1, 100, (1, 1), "which may be too much: config.model.remat=True"),
    ],
)
def test_batches(configure, choose, method, gib, devices, unlabeled, batches, reason):
    config = configure(method=method, crop=257)
    found, reasons = choose(config, many(3), many(unlabeled), devices, gib * GIB)
    assert (found.data.labeled_batch, found.data.unlabeled_batch) == batches
    assert any(reason in line for line in reasons), reasons


def test_accumulation_needs_the_memory_of_a_part(configure, choose):
    config = configure(crop=257)
    config.train.accumulation = 2
    found, _ = choose(config, many(3), many(100), limit=4 * GIB)
    assert (found.data.labeled_batch, found.data.unlabeled_batch) == (4, 4)  # 5 images in each of two parts.


@pytest.mark.parametrize(
    ("unlabeled", "given", "steps", "every"),
    [
        (20, 0, 4000, 200),  # 100 * ceil(20 / 8) = 300 steps are too few.
        (800, 0, 10000, 500),
        (801, 0, 10100, 505),
        (100000, 0, 40000, 2000),
        (800, 150, 150, 7),
        (800, 3, 3, 1),
    ],
)
def test_steps_and_intervals(configure, choose, unlabeled, given, steps, every):
    found, reasons = choose(configure(steps=given), many(3), many(unlabeled))
    assert (found.train.steps, found.train.eval_every, found.train.checkpoint_every) == (steps, every, every)
    assert any(line.startswith("train.steps=") for line in reasons) == (not given)


def test_evaluations_are_a_fifth_of_the_work(configure, choose):
    """Two networks over 100 images of 360 x 480: 34.56 M pixels; a step at crop 129: 16 * 129^2 * 7 = 1.864 M."""
    config, val = configure(crop=129, steps=1000), Sizes(*[(360, 480)] * 100)
    found, reasons = choose(config, many(3), many(100), val=val)
    assert (found.train.eval_every, found.train.checkpoint_every) == (
        75,
        50,
    )  # 18.54 steps are a fifth of 18.54 + 74.2.
    assert any("an evaluation of 100 images is about the work of 19 steps" in line for line in reasons)
    assert choose(configure(crop=129, steps=40), many(3), many(100), val=val)[0].train.eval_every == 40
    config = configure(crop=129, steps=1000, method="unimatch")  # Without a teacher.
    assert choose(config, many(3), many(100), val=val)[0].train.eval_every == 50


def test_learning_rate_follows_the_weights(configure, choose):
    """As in configs/camvid.py from random weights, as in configs/pascal.py from pretrained ones."""
    found, _ = choose(configure(), many(3), many(9))
    assert (found.optimizer.lr, found.optimizer.lr_multi) == (0.02, 1.0)
    found, reasons = choose(configure(pretrained="resnet50.pth"), many(3), many(9))
    assert (found.optimizer.lr, found.optimizer.lr_multi) == (0.002, 10.0)
    assert "optimizer.lr=0.002, optimizer.lr_multi=10: pretrained weights, as on VOC" in reasons


def test_the_teacher_follows_within_a_short_run(configure):
    """By a quarter of it (400 steps: 0.99), and never slower than the published 0.996."""
    assert configure().ema.decay == configure(steps=5000).ema.decay == 0.996
    assert configure(steps=400).ema.decay == 0.99
    assert configure(steps=1).ema.decay == 0


def test_what_is_given_is_kept(configure, choose):
    config = configure(crop=100, steps=7)
    config.data.update({"labeled_batch": 3, "unlabeled_batch": 2})
    config.optimizer.lr = 0.5
    config.train.update({"eval_every": 5, "checkpoint_every": 6})
    found, reasons = choose(config, many(3), many(9))
    assert found.to_dict() == config.to_dict() and reasons == []


def test_recipes_have_nothing_to_choose():
    for recipe in (camvid, cityscapes, coco, pascal, shapes):
        for method in methods.METHODS:
            assert automatic.pending(recipe.get_config(f"method={method}")) == []


@pytest.mark.parametrize("method", methods.METHODS)
def test_chosen_values_are_valid(configure, choose, method):
    config_ = configure(method=method)
    config.validate(config_, device_count=4)
    found, _ = choose(config_, many(3), many(30), devices=4)
    config.validate(found, device_count=4)
    assert automatic.pending(found) == []
    assert automatic.pending(config_) == [*automatic._ALWAYS, *automatic._WITHOUT_EPOCHS]  # Not changed itself.


def test_a_continued_run_keeps_its_choices(configure, choose, tmp_path):
    first, _ = choose(configure(pretrained="x.pth"), many(3), many(100))
    (tmp_path / "run/checkpoints/7").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text(first.to_json())
    before = saved_run.continued(configure(pretrained="x.pth"), tmp_path / "run")
    assert before.to_json() == first.to_json()
    again, reasons = choose(before, many(3), many(100000), devices=16, limit=GIB)  # Whatever became of the machine.
    assert again.to_json() == first.to_json() and reasons == []
    assert saved_run.continued(configure(crop=65), tmp_path / "run").data.crop == 65
    assert saved_run.continued(configure(), tmp_path / "other").data.crop == 0
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(saved_run.WorkdirError, match="config.json: damaged"):
        saved_run.continued(configure(), tmp_path / "run")


def test_every_backbone_was_measured():
    assert set(automatic.MEMORY) == set(models.BACKBONES)
    assert automatic.images_that_fit("resnet101", 513, 0) == 0


def test_memory_of_this_machine():
    """A part of what is free, shared by the devices that the CPU plays."""
    one, all_ = (automatic.memory_of(jax.devices()[:count]) for count in (1, 4))
    assert GIB // 8 < 4 * all_ < 1.5 * one < 4000 * GIB
