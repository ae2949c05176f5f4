"""Named methods: streams, teacher and selection; `method=NAME` picks one.

Supervised, FixMatch, UniMatch, UniMatch V2 and DSSN share one training step (`dssn_jax/learner/step.py`) and differ in
these values. `configs/defaults.py` explains the keys.
"""

from ml_collections import ConfigDict

METHODS = {
    # L_x alone, on twice the labeled batch.
    "supervised": dict(
        labeled_batch_factor=2, strong_views=0, feature_views=0, teacher="none", strong_weight=0.0, feature_weight=0.0,
        image_contrast_weight=0.0, feature_contrast_weight=0.0, selection="threshold",
    ),
    # One strong view, labeled by the student in evaluation mode. Sohn et al., NeurIPS 2020.
    "fixmatch": dict(
        strong_views=1, feature_views=0, teacher="student_eval", strong_weight=1.0, feature_weight=0.0,
        image_contrast_weight=0.0, feature_contrast_weight=0.0, selection="threshold",
    ),
    # FixMatch for few labels and rare classes: an EMA teacher that labels after 80 steps, twice as many labeled
    # images, drawn and weighted by the rarity of their classes; logit adjustment takes a part of the weights' effect on
    # predictions back (docs/results/camvid.md).
    "fixmatch_balanced": dict(
        labeled_batch_factor=2, strong_views=1, feature_views=0, teacher="ema", strong_weight=1.0, feature_weight=0.0,
        image_contrast_weight=0.0, feature_contrast_weight=0.0, selection="threshold", class_weight_power=0.5,
        logit_adjustment=-0.3, ema=dict(warmup_steps=80, batch_stats_epochs=0), views=dict(mix_partner="other"),
        data=dict(labeled_sampling="rare", rare_temperature=0.1),
    ),
    # Two strong views and one feature view. Yang et al., CVPR 2023.
    "unimatch": dict(
        strong_views=2, feature_views=1, teacher="student", strong_weight=0.25, feature_weight=0.5,
        image_contrast_weight=0.0, feature_contrast_weight=0.0, selection="threshold",
    ),
    # Two strong views with complementary channel dropout, labeled by an EMA teacher that follows the student closely at
    # first. Yang et al., TPAMI 2025.
    "unimatch_v2": dict(
        strong_views=2, strong_perturb="complementary", feature_views=0, teacher="ema", strong_weight=0.5,
        feature_weight=0.0, image_contrast_weight=0.0, feature_contrast_weight=0.0, selection="threshold",
        perturb_labeled=False, ema=dict(decay=0.996, ramp=True, warmup_steps=0, batch_stats_epochs=0),
    ),
    # Two strong and two feature views, contrast within each pair, class-aware selection. Tian et al., ACM MM 2023.
    "dssn": dict(
        strong_views=2, feature_views=2, teacher="ema", strong_weight=0.25, feature_weight=0.25,
        image_contrast_weight=0.01, feature_contrast_weight=0.01, selection="class_aware",
    ),
}  # fmt: skip


# Sections of which an entry may have keys, under their names.
_SECTIONS = ("ema", "views", "data")


def apply(config: ConfigDict, name: str) -> None:
    """Fills `config.method`, and those keys of other sections that the entry of the method `name` has."""
    config.method.name = name
    config.method.update({key: value for key, value in METHODS[name].items() if key not in _SECTIONS})
    for section in _SECTIONS:
        config[section].update(METHODS[name].get(section, {}))


def apply_last(config: ConfigDict) -> None:
    """Fills the keys of `config.views` and `config.data` that the entry of the method has, after a recipe set others.

    Those of `config.ema` are left to the recipe, which knows the length of the run.
    """
    entry = METHODS[config.method.name]
    for section in ("views", "data"):
        config[section].update(entry.get(section, {}))
