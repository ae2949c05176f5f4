"""Auto-configuration, against numbers worked out by hand."""

import functools

import jax
import numpy as np
import pytest

from configs import ade20k, camvid, cityscapes, coco, custom, encoders, methods, pascal, shapes
from configs.checks import ConfigError
from dssn_jax import auto_config, models
from dssn_jax.validate import validate_training
from dssn_jax.workdir import records, restore
from input_pipeline.sources.open import Sources, open_sources
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

    def label(self, index):
        return np.zeros((2, 2), np.uint8)


@pytest.fixture
def configure(tmp_path):
    root = make_root(tmp_path / "root", {"a": (0,), "b": (1,)})

    def make(**values):
        arguments = {"root": root, "method": "dssn", **values}
        return custom.get_config(",".join(f"{key}={value}" for key, value in arguments.items()))

    return make


@pytest.fixture
def fill_in(monkeypatch):
    """Fills in a configuration for sources (labeled, unlabeled), devices and bytes per device."""

    def run(config, labeled, unlabeled, devices=1, limit=1000 * GIB, val=None):
        monkeypatch.setattr(auto_config, "memory_of", lambda devices: limit)
        sources = Sources(labeled, unlabeled, val or Sizes((8, 8)))
        return auto_config.fill_in(config, sources, jax.devices()[:1] * devices)

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
        ([(40, 40), (40, 40), (400, 400)], 33),  # The median of an even number of sides is the lower of the middle two.
    ],
)
def test_crop(configure, fill_in, sizes, crop):
    chosen, reasons = fill_in(configure(), Sizes(*sizes[:1]), Sizes(*sizes[1:], sizes[-1]))
    assert chosen.data.crop == crop and any(f"data.crop={crop}: the median short side" in line for line in reasons)


@pytest.mark.parametrize(
    ("encoder", "sides", "crop", "greatest"),
    [
        ("dinov2_w64", (360, 480), 364, 518),  # 25.7 patches.
        ("dinov3_w64", (360, 480), 352, 512),  # 22.5 patches: to the even 22.
        ("dinov2_w64", (2000, 3000), 518, 518),
        ("dinov3_w64", (2000, 3000), 512, 512),
        ("dinov2_w64", (3, 900), 14, 518),
    ],
)
def test_crop_in_patches(configure, fill_in, encoder, sides, crop, greatest):
    chosen, reasons = fill_in(configure(encoder=encoder), Sizes(sides), Sizes(sides))
    assert chosen.data.crop == crop
    patch = 14 if encoder == "dinov2_w64" else 16
    assert any(line.endswith(f"the nearest multiple of {patch}, at most {greatest}") for line in reasons)


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
        ("supervised", 1000, 1, 100, (8, 8), "the recipes' 8"),  # 16 labeled images per step.
        ("supervised", 1000, 16, 100, (8, 16), "a multiple of 16 devices"),
        # resnet50 at crop 257: (4 GiB - 692 MiB) / (9946 bytes * 66049) = 5.43 images: 2 + 2.
        ("dssn", 4, 1, 100, (2, 2), "2 fit 4.0 GiB per device at crop 257 with resnet50"),
        ("supervised", 4, 1, 100, (2, 2), "2 x 2 fit"),
        ("dssn", 4, 2, 100, (4, 4), "5 fit"),  # Ten images on two devices.
        ("dssn", 1, 1, 100, (1, 1), "which may be too much: config.model.remat=True"),
    ],
)
def test_batches(configure, fill_in, method, gib, devices, unlabeled, batches, reason):
    config = configure(method=method, crop=257)
    chosen, reasons = fill_in(config, many(3), many(unlabeled), devices, gib * GIB)
    assert (chosen.data.labeled_batch, chosen.data.unlabeled_batch) == batches
    assert any(reason in line for line in reasons), reasons


def test_accumulation_needs_the_memory_of_a_part(configure, fill_in):
    config = configure(crop=257)
    config.train.accumulation = 2
    chosen, _ = fill_in(config, many(3), many(100), limit=4 * GIB)
    assert (chosen.data.labeled_batch, chosen.data.unlabeled_batch) == (4, 4)  # 5 images in each of two parts.


@pytest.mark.parametrize(
    ("devices", "unlabeled", "batches", "reason"),
    [
        (1, 100, (8, 8), "the recipes' 8"),
        (3, 100, (6, 6), "a multiple of 3 devices x 2 (config.views.mix_partner=reversed)"),
        (8, 100, (8, 16), "a multiple of 8 devices x 2"),
        (1, 5, (8, 4), "there are 5 unlabeled images, a multiple of 1 devices x 2"),
    ],
)
def test_pairs_of_unlabeled_images(configure, fill_in, devices, unlabeled, batches, reason):
    config = configure(encoder="dinov2_w64", method="unimatch_v2", crop=56)
    chosen, reasons = fill_in(config, many(3), many(unlabeled), devices)
    assert (chosen.data.labeled_batch, chosen.data.unlabeled_batch) == batches
    assert any(reason in line for line in reasons), reasons
    validate_training(chosen, devices)


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
def test_steps_and_intervals(configure, fill_in, unlabeled, given, steps, every):
    chosen, reasons = fill_in(configure(steps=given), many(3), many(unlabeled))
    assert (chosen.train.steps, chosen.train.eval_every, chosen.train.checkpoint_every) == (steps, every, every)
    assert any(line.startswith("train.steps=") for line in reasons) == (not given)


def test_evaluations_are_a_fifth_of_the_work(configure, fill_in):
    """Two networks over 100 images of 360 x 480: 34.56 M pixels; a step at crop 129: 16 * 129^2 * 7 = 1.864 M."""
    config, val = configure(crop=129, steps=1000), Sizes(*[(360, 480)] * 100)
    chosen, reasons = fill_in(config, many(3), many(100), val=val)
    assert (chosen.train.eval_every, chosen.train.checkpoint_every) == (
        75,
        50,
    )  # 18.54 steps are a fifth of 18.54 + 74.2.
    assert any("evaluating 100 images costs about as much as 19 steps" in line for line in reasons)
    assert fill_in(configure(crop=129, steps=40), many(3), many(100), val=val)[0].train.eval_every == 40
    config = configure(crop=129, steps=1000, method="unimatch")  # Without a teacher.
    assert fill_in(config, many(3), many(100), val=val)[0].train.eval_every == 50


def test_learning_rate_follows_the_weights(configure, fill_in):
    """As in configs/camvid.py from random weights, as in configs/pascal.py from pretrained ones."""
    chosen, _ = fill_in(configure(), many(3), many(9))
    assert (chosen.optimizer.lr, chosen.optimizer.lr_mults) == (0.02, ())
    chosen, reasons = fill_in(configure(pretrained="resnet50.pth"), many(3), many(9))
    assert (chosen.optimizer.lr, chosen.optimizer.lr_mults) == (0.002, (("decoder/", 10.0),))
    assert any("lr=0.002, optimizer.lr_mults=(('decoder/', 10.0),): pretrained weights" in line for line in reasons)


def test_adamw_has_rates_of_its_own(configure, fill_in):
    """The learning rates for SGD are far too large for AdamW."""
    config = configure(pretrained="resnet50.pth")
    config.optimizer.name = "adamw"
    chosen, _ = fill_in(config, many(3), many(9))
    assert (chosen.optimizer.lr, chosen.optimizer.lr_mults) == (6e-5, (("decoder/", 10.0),))
    config.optimizer.name = "lion"
    with pytest.raises(ConfigError, match="optimizer.lr is 0; expected a learning rate for optimizer.name=lion"):
        fill_in(config, many(3), many(9))


@pytest.mark.parametrize(("pretrained", "lr", "lr_mults"), [("x.pth", 5e-6, (("decoder/", 40.0),)), ("", 5e-4, ())])
def test_vision_transformers_have_rates_of_their_own(configure, fill_in, pretrained, lr, lr_mults):
    config = configure(encoder="dinov3_w64", pretrained=pretrained)
    chosen, reasons = fill_in(config, many(3), many(9))
    assert (chosen.optimizer.name, chosen.optimizer.lr, chosen.optimizer.lr_mults) == ("adamw", lr, lr_mults)
    assert any("vision transformer" in line for line in reasons)
    config.optimizer.name = "sgd"
    assert fill_in(config, many(3), many(9))[0].optimizer.lr == (0.002 if pretrained else 0.02)


def test_the_teacher_follows_within_a_short_run(configure):
    """By a quarter of it (400 steps: 0.99), and never slower than the published 0.996."""
    assert configure().ema.decay == configure(steps=5000).ema.decay == 0.996
    assert configure(steps=400).ema.decay == 0.99
    assert configure(steps=1).ema.decay == 0


def test_what_is_given_is_kept(configure, fill_in):
    config = configure(crop=100, steps=7)
    config.data.update({"labeled_batch": 3, "unlabeled_batch": 2})
    config.optimizer.lr = 0.5
    config.train.update({"eval_every": 5, "checkpoint_every": 6})
    chosen, reasons = fill_in(config, many(3), many(9))
    assert chosen.to_dict() == config.to_dict() and reasons == []


def counted(method):
    """Returns the keys that a method leaves to the labeled masks."""
    return ["data.class_pixels"] if method == "fixmatch_balanced" else []


def test_recipes_have_nothing_to_fill_in():
    for recipe in (ade20k, camvid, cityscapes, coco, pascal, shapes):
        for method in methods.METHODS:
            assert auto_config.unset_keys(recipe.get_config(f"method={method}")) == counted(method)


@pytest.mark.parametrize("method", methods.METHODS)
def test_chosen_values_are_valid(configure, fill_in, method):
    config = configure(method=method)
    validate_training(config, device_count=4)
    chosen, _ = fill_in(config, many(3), many(30), devices=4)
    validate_training(chosen, device_count=4)
    assert auto_config.unset_keys(chosen) == []
    always = [*auto_config._ALWAYS, *auto_config._WITHOUT_EPOCHS]
    assert auto_config.unset_keys(config) == always + counted(method)  # Not changed itself.


def test_a_continued_run_keeps_its_choices(configure, fill_in, tmp_path):
    first, _ = fill_in(configure(pretrained="x.pth"), many(3), many(100))
    (tmp_path / "run/checkpoints/7").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text(first.to_json())
    before = restore.inherit_choices(configure(pretrained="x.pth"), tmp_path / "run")
    assert before.to_json() == first.to_json()
    again, reasons = fill_in(before, many(3), many(100000), devices=16, limit=GIB)  # Whatever became of the machine.
    assert again.to_json() == first.to_json() and reasons == []
    assert restore.inherit_choices(configure(crop=65), tmp_path / "run").data.crop == 65
    assert restore.inherit_choices(configure(), tmp_path / "other").data.crop == 0
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(records.WorkdirError, match="config.json: damaged"):
        restore.inherit_choices(configure(), tmp_path / "run")


@pytest.mark.parametrize(
    "options",
    [
        {"method__class_weight_power": 0.5},
        {"method__logit_adjustment": -0.25},
        {"data__labeled_sampling": "rare"},
        {"views__paste_classes": 2},
    ],
)
def test_classes_are_counted_where_a_key_needs_them(tiny_config, tmp_path, options):
    config = tiny_config("supervised", **options)
    sources = open_sources(config)
    chosen, (reason,) = auto_config.fill_in(config, sources, jax.devices()[:1])
    labels = np.stack([sources.labeled[index]["label"] for index in range(8)])
    pixels = np.bincount(labels.ravel(), minlength=6)
    assert chosen.data.class_pixels == tuple(pixels.tolist())
    key = next(iter(options)).replace("__", ".")
    assert reason.startswith(f"data.class_pixels: counted in 8 labeled masks, for {key}={next(iter(options.values()))}")
    rarest = config.data.classes[np.argmin(pixels)]
    assert f"the rarest: {rarest} {pixels.min() / pixels.sum():.2%}" in reason
    (tmp_path / "checkpoints/7").mkdir(parents=True)
    (tmp_path / "config.json").write_text(chosen.to_json())
    assert restore.inherit_choices(config, tmp_path).to_json() == chosen.to_json()


def test_an_encoder_that_was_not_measured_is_taken_for_a_demanding_one():
    """It needs more than every convolutional one, but not what the largest transformers need."""
    assert set(auto_config.MEMORY) == {name.removesuffix("_reg") for name in models.ENCODERS}
    assert auto_config.images_that_fit("resnet101", 513, 0) == 0
    fit = {encoder: auto_config.images_that_fit(encoder, 513, 80 * GIB) for encoder in [*models.ENCODERS, "mine"]}
    assert 0 < fit["mine"] == min(count for name, count in fit.items() if encoders.find_family(name) is None)
    assert fit["dinov2_small"] > fit["dinov2_base_reg"] == fit["dinov2_base"] > fit["dinov2_large"]
    assert fit["dinov3_7b"] == 0  # 16 bytes for each of 6.9 G parameters are more than 80 GiB.


def test_gpus_hold_more_images_of_transformers():
    """Base takes 11956 bytes per pixel there, by the compiler for the H100: 80 GiB hold 26 images of 518 pixels."""
    fit = functools.partial(auto_config.images_that_fit, crop=518, limit=80 * GIB)
    assert fit("dinov2_base", platform="cuda") == fit("dinov2_base_reg", platform="gpu") == 26
    assert fit("dinov2_base", platform="tpu") == fit("dinov2_base") == 7
    assert fit("resnet101", platform="cuda") == fit("resnet101") and fit("mine", platform="cuda") == fit("mine")


def test_memory_of_this_machine():
    """A share of what is free, divided among the simulated devices."""
    one, all_ = (auto_config.memory_of(jax.devices()[:count]) for count in (1, 4))
    assert GIB // 8 < 4 * all_ < 1.5 * one < 4000 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_the_container_has_left(version, tmp_path, monkeypatch):
    names = {
        1: ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
        2: ("memory.max", "memory.current", "memory.stat"),
    }
    limit, usage, used = (tmp_path / name for name in names[version])
    monkeypatch.setattr(auto_config, "_CONTAINER", tmp_path)
    machine = auto_config.free_memory()
    (tmp_path / "memory").mkdir()
    limit.write_text("9000000\n")
    usage.write_text("7000000\n")
    used.write_text("anon 1\ninactive_file 500\ntotal_inactive_file 500\n")
    assert auto_config.free_memory() == 2000500
    usage.write_text("9900000\n")
    assert auto_config.free_memory() == 0
    limit.write_text({1: f"{2**63 - 4096}\n", 2: "max\n"}[version])  # No limit.
    assert auto_config.free_memory() == pytest.approx(machine, rel=0.5)
