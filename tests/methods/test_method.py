import math

import jax.numpy as jnp
import pytest

from configs import defaults, methods
from configs.checks import ConfigError
from dssn_jax.methods import method
from dssn_jax.methods.losses import CrossEntropy, Ohem
from dssn_jax.methods.perturbations import ChannelDropout, ComplementaryDropout
from dssn_jax.methods.pseudo_labels import Aligned, Threshold


def config_of(name="dssn", **options):
    config = defaults.get_config()
    methods.apply(config, name)
    config.method.update(options)
    return config


STRONG = [("s1", "strong", 0.25, "teacher"), ("s2", "strong", 0.25, "teacher")]
CONTRASTS = [("image", ("s1", "s2"), 0.01), ("feature", ("fp1", "fp2"), 0.01)]


@pytest.mark.parametrize(
    ("name", "streams", "contrasts"),
    [
        ("supervised", [], []),
        ("fixmatch", [("s1", "strong", 1.0, "teacher")], []),
        ("fixmatch_balanced", [("s1", "strong", 1.0, "teacher")], []),
        ("unimatch", [*STRONG, ("fp1", "feature", 0.5, "student")], []),
        ("unimatch_v2", [("s1", "strong", 0.5, "teacher"), ("s2", "strong", 0.5, "teacher")], []),
        ("dssn", [*STRONG, ("fp1", "feature", 0.25, "student"), ("fp2", "feature", 0.25, "student")], CONTRASTS),
    ],
)
def test_named_methods_are_these_streams(name, streams, contrasts):
    built = method.from_config(config_of(name), steps_per_epoch=10)
    assert [(s.name, s.view, s.weight, s.target) for s in built.streams] == streams
    assert [(c.name, c.streams, c.weight) for c in built.contrasts] == contrasts
    assert {s.perturb for s in built.of_view("feature")} <= {ChannelDropout(0.5)}
    assert {s.perturb for s in built.of_view("strong")} <= {ComplementaryDropout() if name == "unimatch_v2" else None}
    assert built.has_ema == (name in ("dssn", "unimatch_v2", "fixmatch_balanced"))
    assert built.uses_unlabeled == (name != "supervised")
    assert built.labeled_loss == CrossEntropy(255)


def test_selections_are_aligned_where_classes_are_counted():
    """A network that is only applied has no counts."""
    config = config_of("fixmatch", align_classes=True, selection_momentum=0.98)
    config.data.classes = ("a", "b")
    assert method.from_config(config, 10).selection == Threshold(0.95)
    config.data.class_pixels = (1, 3)
    assert method.from_config(config, 10).selection == Aligned(Threshold(0.95), (0.25, 0.75), 0.98)


@pytest.mark.parametrize("loss", ["ce", "ohem"])
def test_classes_are_balanced_where_they_are_counted(loss):
    """Pseudo-labels where that is asked for; a network that is only applied has no counts."""
    config = config_of("fixmatch", class_weight_power=1.0, logit_adjustment=-0.5, labeled_loss=loss)
    config.method.weigh_pseudo_labels = True
    built = method.from_config(config, 10)
    assert built.labeled_loss.weights == built.pseudo_label_weights == built.logit_shifts == ()
    config.data.class_pixels = (1, 3)
    built = method.from_config(config, 10)
    assert built.labeled_loss.weights == built.pseudo_label_weights == pytest.approx((2, 2 / 3))
    assert built.logit_shifts == pytest.approx((0.5 * math.log(4), 0.5 * math.log(4 / 3)))
    config.method.weigh_pseudo_labels = False
    assert method.from_config(config, 10).pseudo_label_weights == ()


def test_complementary_pairs_ohem_and_epochs_become_steps():
    config = config_of("unimatch", strong_perturb="complementary", teacher="ema", labeled_loss="ohem", ohem_min_kept=7)
    config.ema.update({"warmup_epochs": 2, "batch_stats_epochs": 3})
    built = method.from_config(config, steps_per_epoch=10)
    assert built.of_view("strong")[1].perturb == ComplementaryDropout()
    assert built.labeled_loss == Ohem(0.7, min_kept=14, group=2)
    assert (built.ema.warmup_steps, built.ema.batch_stats_steps) == (20, 30)


def test_unimatch_v2_has_a_ramp_from_the_first_step():
    assert method.from_config(config_of("unimatch_v2"), 10).ema == method.Ema(0.996, ramp=True, warmup_steps=0)


@pytest.mark.parametrize(("strong", "first"), [(0, 0), (1, 2), (2, 2)])
def test_feature_streams_are_numbered_as_pairs_of_their_own(strong, first):
    built = method.from_config(
        config_of(strong_views=strong, image_contrast_weight=0.0, feature_perturb="complementary"), 10
    )
    assert {stream.perturb for stream in built.of_view("feature")} == {ComplementaryDropout()}
    assert [built.number(stream) for stream in built.of_view("feature")] == [first, first + 1]


@pytest.mark.parametrize(("images", "parts", "fits"), [(8, 4, True), (4, 4, False), (12, 4, False), (0, 4, True)])
def test_reversed_partners_need_pairs_on_each_device(images, parts, fits):
    config = config_of("unimatch_v2")
    config.data.unlabeled_batch = images
    method.check_pairs(config, parts)
    config.views.mix_partner = "reversed"
    if fits:
        method.check_pairs(config, parts)
        return
    with pytest.raises(ConfigError, match="expected a multiple of 8, or config.views.mix_partner='other'"):
        method.check_pairs(config, parts)


def test_ema_rates_by_hand():
    plain, ramp = method.Ema(0.9, warmup_steps=2), method.Ema(0.9, ramp=True, warmup_steps=0)
    assert [float(plain.rate(jnp.int32(step))) for step in range(4)] == pytest.approx([0, 0, 0.9, 0.9])
    assert [float(ramp.rate(jnp.int32(step))) for step in (0, 1, 3, 99)] == pytest.approx([0, 0.5, 0.75, 0.9])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "emma"}, "did you mean 'ema'"),
        ({"selection": "class_awar"}, "did you mean 'class_aware'"),
        ({"labeled_loss": "mse"}, "known: ce, ohem"),
        ({"teacher": "none"}, "config.method.strong_views > 0 needs pseudo-labels"),
        ({"strong_views": 1, "image_contrast_weight": 0.0, "strong_perturb": "complementary"}, "an even number"),
        ({"strong_views": 1}, "config.method.image_contrast_weight is 0.01, which needs config.method.strong_views=2"),
        ({"feature_views": 1, "feature_contrast_weight": 0.0, "feature_perturb": "complementary"}, "an even number"),
        ({"feature_views": 3}, "needs config.method.feature_views=2"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        method.check(config_of(**options))
