"""Which checks apply to a network that is only applied, and which to training."""

import numpy as np
import pytest

from configs.checks import ConfigError
from dssn_jax.validate import validate_evaluation, validate_model, validate_training
from input_pipeline.transforms.cutmix import cutmix_box


def test_batches_matter_to_training_alone(tiny_config):
    config = tiny_config(data__labeled_batch=3, train__accumulation=2)
    validate_model(config)
    validate_evaluation(config)
    with pytest.raises(ConfigError, match=r"labeled_batch is 3; expected a multiple of 1 devices x 2 micro-batches"):
        validate_training(config, device_count=1)


def test_labeled_images_per_step_are_split_over_the_devices(tiny_config):
    """Twice data.labeled_batch, for the supervised baseline."""
    config = tiny_config("supervised", data__labeled_batch=3)
    validate_training(config, device_count=6)
    with pytest.raises(ConfigError, match=r"is 3, which makes 6 images per step \(config.method.labeled_batch_factor"):
        validate_training(config, device_count=4)


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        ("dinov2_w64", {"data__crop": 49}, "config.data.crop is 49; dinov2_w64 needs a multiple of 14: 42 or 56"),
        ("dinov3_w64", {"data__crop": 8}, "config.data.crop is 8; dinov3_w64 needs a multiple of 16: 16"),
        (
            "dinov2_w64", {"data__crop": 56, "eval__mode": "sliding_window", "eval__crop": 50},
            "config.eval.crop, the sliding window, is 50; dinov2_w64 needs a multiple of 14: 42 or 56",
        ),
        ("dinov2_w64", {"data__crop": 56, "eval__crop": 50}, ""),  # Whole images: no window.
        ("dinov2_w64", {"data__crop": 56, "eval__mode": "sliding_window"}, ""),  # The window is the training crop.
        ("resnet10w16", {"data__crop": 50}, ""),
    ],
)  # fmt: skip
def test_crops_are_multiples_of_the_patch(tiny_config, encoder, options, message):
    config = tiny_config(model__encoder=encoder, **options)
    config.model.decoder = "deeplabv3plus" if encoder == "resnet10w16" else "dpt"
    if message:
        with pytest.raises(ConfigError, match=f"^{message}$"):
            validate_training(config, device_count=1)
    else:
        validate_training(config, device_count=1)


@pytest.mark.parametrize(
    ("key", "value", "check"),
    [
        ("model__encoder", "resnet51", validate_model),
        ("model__dtype", "float16", validate_model),
        ("eval__mode", "whole", validate_evaluation),
        ("eval__scales", (0.0,), validate_evaluation),
        ("eval__batch", 0, validate_evaluation),
        ("views__hue", 0.6, lambda config: validate_training(config, 1)),
        ("views__operations", (3, 1), lambda config: validate_training(config, 1)),
        ("optimizer__name", "lion", lambda config: validate_training(config, 1)),
        ("views__paste_classes", 1, lambda config: validate_training(config, 1)),
        ("method__feature_dropout", 1.0, lambda config: validate_training(config, 1)),
        ("seed", -1, validate_model),
        ("data__class_pixels", (1, 2), validate_model),
        ("data__class_pixels", (0,) * 6, validate_model),
        ("eval__crop", 1, validate_evaluation),
        ("data__crop", 7, validate_evaluation),
    ],
)
def test_the_key_is_named(tiny_config, key, value, check):
    with pytest.raises(ConfigError, match=f"config.{key.replace('__', '.')}"):
        check(tiny_config(**{key: value}))


@pytest.mark.parametrize(
    ("area", "aspect", "accepted"),
    [
        ((0.02, 0.4), (0.3, 1 / 0.3), True),
        ((0.0, 0.0), (1.0, 1.0), True),
        ((0.0, 0.9), (0.95, 1.05), True),
        ((0.9, 1.0), (1.0, 1.0), False),  # A box of all of the crop has one place.
        ((0.5, 0.5), (0.01, 0.5), False),  # Such boxes are as wide as the crop, or wider.
        ((0.1, 0.4), (5.0, 9.0), False),
    ],
)
def test_cutmix_boxes_must_fit(tiny_config, area, aspect, accepted):
    """Boxes are drawn until one fits: an accepted range must not take long."""
    config = tiny_config(views__cutmix_area=area, views__cutmix_aspect=aspect, views__cutmix=1.0)
    if accepted:
        validate_training(config, 1)
        rng = np.random.default_rng(0)
        draws = [cutmix_box(33, config.views, rng) for _ in range(100)]
        assert all(0 <= low <= high <= 33 for box in draws for low, high in (box[::2], box[1::2]))
    else:
        with pytest.raises(ConfigError, match="config.views.cutmix_area is .*config.views.cutmix_aspect"):
            validate_training(config, 1)
