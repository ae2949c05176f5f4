"""Recipes with vision transformers, against UniMatch V2's published table; DINOv3 has them at crops of its patch."""

import importlib

import numpy as np
import pytest

from configs import ade20k, camvid, cityscapes, coco, custom, encoders, methods, pascal, shapes
from configs.checks import ConfigError, check_multiple, check_values
from dssn_jax import models
from dssn_jax.learner import optimizer
from dssn_jax.validate import validate_training
from input_pipeline.batch import labeled_rows
from input_pipeline.labels import Labels
from tests.input_pipeline.own_images import make_root


@pytest.mark.parametrize(
    ("module", "crops", "batch", "epochs", "loss", "mode", "classes"),
    [
        (pascal, (518, 512), 16, 60, "ce", "original", 21),
        (cityscapes, (798, 800), 8, 180, "ohem", "sliding_window", 19),
        (ade20k, (518, 512), 8, 60, "ce", "original", 150),
        (coco, (518, 512), 16, 20, "ce", "original", 81),
    ],
)
@pytest.mark.parametrize("encoder", ["dinov2_base", "dinov3_small_plus"])
def test_unimatch_v2(module, crops, batch, epochs, loss, mode, classes, encoder):
    config = module.get_config(f"encoder={encoder},method=unimatch_v2")
    data, method, views = config.data, config.method, config.views
    assert data.crop == crops[encoder.startswith("dinov3")]
    assert (labeled_rows(config), data.unlabeled_batch, config.train.epochs, config.train.steps) == (
        batch, batch, epochs, 0,
    )  # fmt: skip
    assert (method.labeled_loss, config.eval.mode, config.eval.windows, config.eval.crop) == (loss, mode, "inside", 0)
    assert (config.model.encoder, config.model.decoder, len(data.classes)) == (encoder, "dpt", classes)
    rates = config.optimizer
    assert (rates.name, rates.lr, rates.lr_mults, rates.power) == ("adamw", 5e-6, (("decoder/", 40.0),), 0.9)
    assert (rates.weight_decay, rates.wd_mults, rates.freeze) == (0.01, (), "")
    assert (rates.b1, rates.b2, rates.eps) == (0.9, 0.999, 1e-8)
    assert (method.selection, method.threshold, method.teacher) == ("threshold", 0.95, "ema")
    assert (method.strong_views, method.strong_perturb, method.strong_weight) == (2, "complementary", 0.5)
    assert (method.feature_views, method.image_contrast_weight, method.perturb_labeled) == (0, 0, False)
    ema = config.ema
    assert (ema.decay, ema.ramp, ema.warmup_steps, ema.warmup_epochs, ema.batch_stats_epochs) == (0.996, True, 0, 0, 0)
    assert (data.scale, data.flip) == ((0.5, 2.0), 0.5)
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (views.jitter, views.brightness, views.contrast, views.saturation, views.hue) == (0.8, 0.5, 0.5, 0.5, 0.25)
    assert (views.gray, views.blur, views.blur_sigma, views.operations) == (0.2, 0.5, (0.1, 2.0), (0, 0))
    assert (views.cutmix, views.cutmix_area, views.cutmix_aspect) == (0.5, (0.02, 0.4), (0.3, 1 / 0.3))
    assert views.mix_partner == "reversed"


@pytest.mark.parametrize(
    ("module", "rows", "steps"), [(pascal, 32, 5580), (cityscapes, 16, 33660), (ade20k, 16, 22500), (coco, 32, 18740)]
)
def test_supervised(module, rows, steps):
    """Twice the labeled images; 3000, 3000, 6000 and 30000 of them per epoch, on four GPUs."""
    config = module.get_config("encoder=dinov2_base,method=supervised")
    assert (labeled_rows(config), config.train.steps, config.method.teacher) == (rows, steps, "none")


@pytest.mark.parametrize(("method", "group"), [("unimatch_v2", 2), ("fixmatch", 2), ("dssn", 2), ("supervised", 4)])
def test_ohem(method, group):
    """At least 200000 pixels per GPU are kept on four GPUs, however many labeled images each has."""
    for encoder in ("dinov2_small", "dinov3_base"):
        config = cityscapes.get_config(f"encoder={encoder},method={method}")
        settings = config.method
        assert settings.ohem_group == group == labeled_rows(config) // 4
        assert settings.ohem_min_kept * group == 200000 and settings.ohem_threshold == 0.7
    smaller = cityscapes.get_config("encoder=dinov2_small,method=unimatch_v2,crop=392").method.ohem_min_kept
    assert smaller == round(100000 * (392 / 798) ** 2)


def test_other_methods():
    fixmatch = pascal.get_config("encoder=dinov2_small,method=fixmatch")
    assert (fixmatch.method.teacher, fixmatch.ema.ramp, fixmatch.method.strong_weight) == ("ema", True, 1)
    assert (fixmatch.method.strong_views, fixmatch.method.strong_perturb) == (1, "none")
    for module in (pascal, cityscapes):
        dssn = module.get_config("encoder=dinov2_small,method=dssn")
        assert (dssn.method.selection, dssn.method.strong_perturb) == ("class_aware", "none")
        assert (dssn.method.feature_views, dssn.method.feature_perturb) == (2, "complementary")
        assert (dssn.method.image_contrast_weight, dssn.method.feature_contrast_weight) == (0.01, 0.01)
        assert (dssn.ema.ramp, dssn.ema.warmup_epochs, dssn.method.perturb_labeled) == (True, 0, False)


def test_defaults_are_published_recipes():
    assert pascal.get_config().method.name == pascal.get_config("encoder=dinov2_base").method.name == "dssn"
    config = ade20k.get_config()
    assert (config.model.encoder, config.method.name) == ("dinov2_base", "unimatch_v2")
    convolutional = ade20k.get_config("encoder=resnet101,method=dssn")
    assert (convolutional.data.crop, convolutional.model.decoder) == (513, "deeplabv3plus")
    assert (convolutional.optimizer.name, convolutional.optimizer.lr, convolutional.train.epochs) == ("sgd", 0.004, 60)


def test_decoder_argument():
    config = pascal.get_config("encoder=dinov2_base,decoder=linear,method=unimatch_v2")
    assert config.model.decoder == "linear"
    assert config.name == "pascal split=183 encoder=dinov2_base decoder=linear method=unimatch_v2 crop=518"
    assert pascal.get_config("encoder=resnet50").model.decoder == "deeplabv3plus"
    assert pascal.get_config("encoder=resnet50").name == "pascal split=183 encoder=resnet50 method=dssn crop=513"


def test_crops():
    """One that is given is kept, so that a mistake is answered; others are the recipe's, in patches."""
    assert pascal.get_config("encoder=dinov2_small,crop=513").data.crop == 513
    assert camvid.get_config("encoder=dinov2_small").data.crop == 322
    assert camvid.get_config("encoder=dinov3_small").data.crop == 320
    assert [encoders.nearest_crop(name, 49) for name in ("resnet50", "dinov2_w64", "dinov3_w64")] == [49, 56, 48]
    assert [encoders.nearest_crop("dinov2_w64", crop) for crop in (0, 1, 20, 22)] == [0, 14, 14, 28]
    with pytest.raises(ConfigError, match="data.crop is 513; dinov2_base needs a multiple of 14: 504 or 518$"):
        check_multiple("config.data.crop", 513, 14, "dinov2_base")
    with pytest.raises(ConfigError, match="crop is 8; e needs a multiple of 16: 16$"):
        check_multiple("crop", 8, 16, "e")
    check_multiple("crop", 512, 16, "e")


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("name", ["pascal", "cityscapes", "coco", "ade20k", "camvid", "shapes", "custom"])
@pytest.mark.parametrize("encoder", ["dinov2_w64", "dinov3_w64"])
def test_every_recipe_is_valid(tmp_path, name, encoder, method):
    argument = f"encoder={encoder},method={method}"
    if name == "custom":
        argument += f",root={make_root(tmp_path, {'a': (0,)}, unlabeled=('u',))}"
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    check_values(config)
    validate_training(config, device_count=4)
    assert config.optimizer.name == "adamw"


def test_families_are_those_of_the_registry():
    """A vision transformer has the patch that its family says; every other encoder has the convolutional recipes."""
    model = pascal.get_config().model
    for name in models.ENCODERS:
        family = encoders.find_family(name)
        model.encoder, model.decoder = name, encoders.decoder_for(name)
        assert models.build(model, 2).size_multiple == (family.patch if family else 1)


def test_the_decoder_keeps_its_rate_beside_a_frozen_encoder():
    config = pascal.get_config("encoder=dinov2_w64,method=unimatch_v2").optimizer
    config.freeze = "encoder/"
    params = {"encoder": {"norm": {"scale": 1.0}}, "decoder": {"head": {"kernel": 1.0}}}
    optimizer.check(config, params)
    built = optimizer.from_config(config, steps=10)
    trained, frozen = built.partition(params)
    assert (trained, frozen) == ({"decoder": params["decoder"]}, {"encoder": params["encoder"]})
    gradient = {"decoder": {"head": {"kernel": 1.0}}}
    update, _ = built.transform.update(gradient, built.transform.init(trained), trained)
    # Adam's first update is the sign of the gradient; the decay is 0.01 of the parameter, both times the rate.
    assert update["decoder"]["head"]["kernel"] == pytest.approx(-5e-6 * 40 * 1.01, rel=1e-5)


def test_rates_on_shapes_and_camvid_follow_the_weights():
    for module in (shapes, camvid):
        assert module.get_config("encoder=dinov2_w64").optimizer.lr == 0
    assert shapes.get_config("encoder=dinov2_w64").views.mix_partner == "other"


def test_own_images(tmp_path):
    root = make_root(tmp_path, {"a": (0,)}, unlabeled=("u",))
    config = custom.get_config(f"root={root},encoder=dinov2_small,decoder=linear,method=unimatch_v2")
    assert (config.model.decoder, config.optimizer.lr, config.data.crop) == ("linear", 0, 0)
    assert (config.eval.windows, config.data.unlabeled_batch) == ("inside", 0)


def test_annotations_of_the_ade20k_benchmark(tmp_path):
    """The label map of docs/data.md: 0 is ignored, 1 to 150 are the classes."""
    path = tmp_path / "benchmark.txt"
    path.write_text("\n".join(["0 ignore", *(f"{i} {i - 1}" for i in range(1, 151))]))
    config = ade20k.get_config()
    config.data.label_map = str(path)
    labels = Labels.from_config(config.data)
    raw = np.arange(151, dtype=np.uint8)[None]
    assert labels.to_ids(raw, "mask.png").tolist() == [[255, *range(150)]]
    assert labels.uncovered(np.uint8([[3, 255]])) == [255]  # A mask of UniMatch V2 read with the map.
    config.data.label_map = ""
    assert Labels.from_config(config.data).uncovered(raw) == [150]  # A mask of the benchmark read without it.
    assert (ade20k.CLASSES[0], ade20k.CLASSES[12], ade20k.CLASSES[149]) == ("wall", "person", "flag")
