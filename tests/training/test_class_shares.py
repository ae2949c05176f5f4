"""Log messages about classes that are rarely or never pseudo-labeled."""

import json
import re

import numpy as np
import pytest

from dssn_jax.methods import method
from dssn_jax.training.class_shares import ClassShares


@pytest.fixture
def watch(tiny_config):
    """Returns a function (steps per epoch, class names, SECTION__KEY=value, ...) -> ClassShares."""

    def make(steps_per_epoch, classes=("a", "b", "c", "d", "e"), **options):
        config = tiny_config(**{"data__classes": classes, "ema__warmup_steps": 1, **options})
        return ClassShares(config, method.from_config(config, steps_per_epoch), steps_per_epoch)

    return make


def shares(step):
    """Returns shares of five classes in a step: a is never labeled, c at step 90 alone, d only until step 120."""
    return np.array([0, 0.1, 0.09 * (step == 90), 0.2 * (step <= 120), 0.001 * step], np.float32)


def lines(watch, first, last):
    """Returns the lines of the log by step."""
    said = {step: watch.count(step, shares(step)) for step in range(first, last + 1)}
    return {step: text for step, text in said.items() if text}


def named(line):
    return re.search(r"pseudo-labeled as (.*); such", line)[1]


def test_smallest_shares_and_missing_classes_of_each_epoch(watch):
    said = lines(watch(60), 1, 250)
    assert list(said) == [60, 120, 180, 240]
    # The first step is the teacher's warm-up. In steps 61 to 120, class c has 0.09 / 60 of the pixels.
    assert "in 59 steps" in said[60][0] and named(said[60][1]) == "a, c"
    assert said[120][0] == "step 120: least pseudo-labeled in 60 steps, in percent of the pixels: a 0, c 0.15, e 9.05"
    assert [named(text[1]) for text in said.values()] == ["a, c", "a", "a, c, d", "a, c, d"]
    assert all(len(text) == 2 and text[1].startswith("WARNING: ") for text in said.values())


def test_short_epochs_are_joined_and_the_warm_up_is_left_out(watch):
    assert list(lines(watch(23), 1, 300)) == [69, 138, 207, 276]
    assert list(lines(watch(60, ema__warmup_steps=60), 1, 300)) == [120, 180, 240, 300]
    assert list(lines(watch(60, ema__warmup_steps=11), 1, 120)) == [120]  # 49 steps are too few.
    assert "in 50 steps" in lines(watch(60, ema__warmup_steps=10), 1, 60)[60][0]
    assert "in 60 steps" in lines(watch(60, method__teacher="student_eval"), 1, 60)[60][0]


@pytest.mark.parametrize("stop", [1, 37, 60, 95, 119])
def test_a_run_that_continues_says_the_same(watch, stop):
    stopped, continued = watch(60), watch(60)
    said = lines(stopped, 1, stop)
    continued.restore({"scores": {}, **json.loads(json.dumps(stopped.meta()))})
    assert said | lines(continued, stop + 1, 250) == lines(watch(60), 1, 250)
    earlier = watch(60)
    earlier.restore({"scores": {}})  # A checkpoint without sums.
    assert list(lines(earlier, 30, 130)) == [120]


def test_classes_that_no_labeled_image_has_are_not_missed(watch):
    said = lines(watch(60, data__class_pixels=(0, 5, 7, 9, 2)), 1, 250)
    assert [len(text) for text in said.values()] == [2, 1, 2, 2] and named(said[180][1]) == "c, d"


def test_every_class_pseudo_labeled_is_no_warning(watch):
    every = watch(60)
    for step in range(1, 121):
        said = every.count(step, np.full(5, 0.01, np.float32))
    assert len(said) == 1 and "WARNING" not in said[0]


def test_many_classes_are_counted_and_names_escaped(watch):
    names = ("\u2028", *(f"class {k}" for k in range(9)))
    one = watch(60, names)
    for step in range(1, 61):
        said = one.count(step, np.zeros(10, np.float32))
    assert named(said[1]) == r"\u2028, class 0, class 1 and 7 more" and "\u2028" not in "".join(said)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (
            {},
            "config.method.class_aware_floor below 0.92; config.method.selection=adaptive; "
            "config.method.align_classes=True; config.method.class_weight_power=0.5; "
            "config.data.labeled_sampling=rare; config.views.mix_partner=labeled with config.views.paste_classes=1",
        ),
        (
            {"method__selection": "threshold", "data__labeled_sampling": "rare", "views__mix_partner": "labeled"},
            "config.method.threshold below 0.95; config.method.selection=adaptive; "
            "config.method.align_classes=True; config.method.class_weight_power=0.5; config.views.paste_classes=1",
        ),
        (
            {
                "method__selection": "adaptive", "method__class_weight_power": 1.0, "data__labeled_sampling": "rare",
                "views__mix_partner": "labeled", "views__paste_classes": 2, "method__align_classes": True,
            },
            "more labeled images of the class",
        ),
    ],
)  # fmt: skip
def test_advice_is_what_the_run_does_not_have(watch, options, advice):
    assert lines(watch(60, **options), 1, 60)[60][1].endswith(f"What may help: {advice}")
