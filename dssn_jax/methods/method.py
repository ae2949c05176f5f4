"""A method as data: which forwards run and which terms count. Filled from `config.method` and `config.teacher`."""

import dataclasses

from dssn_jax.methods import losses, pseudo_labels

LABELERS = ("none", "student", "student_eval", "teacher")
LABELED_LOSSES = ("ce", "ohem")


@dataclasses.dataclass(frozen=True)
class Method:
    """See `configs/defaults.py`, `_method` and `_teacher`, for what the fields mean."""

    strong_views: int
    feature_views: int
    labeler: str
    strong_weight: float
    feature_weight: float
    image_contrast_weight: float
    feature_contrast_weight: float
    selection: pseudo_labels.ClassAware | pseudo_labels.Threshold
    perturb_labeled: bool = True
    labeled_loss: str = "ce"
    ohem_threshold: float = 0.7
    ohem_min_kept: int = 100000  # Of a group.
    ohem_group: int = 1
    keep_rate: float = 0.996
    warmup_steps: int = 1
    teacher_batch_stats_steps: int = 0
    ignore: int = 255

    @property
    def has_teacher(self) -> bool:
        return self.labeler == "teacher"

    @property
    def uses_unlabeled(self) -> bool:
        return self.strong_views + self.feature_views > 0

    def labeled(self, logits, labels):
        """The labeled term L_x: logits [L, H, W, K], labels [L, H, W] -> scalar."""
        if self.labeled_loss == "ce":
            return losses.cross_entropy(logits, labels, self.ignore)
        return losses.ohem_cross_entropy(
            logits, labels, self.ohem_threshold, self.ohem_min_kept, self.ohem_group, self.ignore
        )


def from_config(config, steps_per_epoch: int) -> Method:
    """Returns the method of a validated config; epochs of the teacher's schedule become steps."""
    method, teacher = config.method, config.teacher
    same_name = {field.name: method[field.name] for field in dataclasses.fields(Method) if field.name in method}
    same_name["selection"] = pseudo_labels.from_config(method)
    same_name["ohem_min_kept"] = method.ohem_min_kept * method.ohem_group
    return Method(
        **same_name,
        keep_rate=ema.decay,
        warmup_steps=max(ema.warmup_steps, round(ema.warmup_epochs * steps_per_epoch)),
        teacher_batch_stats_steps=round(ema.batch_stats_epochs * steps_per_epoch),
        ignore=config.data.ignore,
    )
