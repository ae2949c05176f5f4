"""Which classes are pseudo-labeled: their shares of pixels, and a warning of those that never are."""

import math

import numpy as np

from dssn_jax.methods.method import Method
from input_pipeline.errors import first_names, printable

SHARES = "pseudo_labels"  # Name of the metric; `dssn_jax.methods.objective.class_shares`.
_LEAST_STEPS = 50  # That a share is averaged over before anything is said about it.
_LEAST_CLASSES = 3  # With the smallest shares, which the log names.


class ClassShares:
    """Averages the shares of the classes over epochs, or several short ones, and says which are small.

    Steps of the teacher's warm-up do not count. Sums are part of the meta of checkpoints, so that a run that continues
    says the same as one that was never stopped.
    """

    def __init__(self, config, method: Method, steps_per_epoch: int):
        self._config, self._classes = config, [printable(name) for name in config.data.classes]
        self._warmup = method.ema.warmup_steps if method.has_ema else 0
        self._period = steps_per_epoch * math.ceil(_LEAST_STEPS / steps_per_epoch)
        self._counted, self._sums = 0, np.zeros(len(self._classes))

    def meta(self) -> dict:
        """Returns what has been counted since the last period ended, for `restore`."""
        return {SHARES: {"steps": self._counted, "sums": self._sums.tolist()}}

    def restore(self, meta: dict) -> None:
        """Continues from the meta of a checkpoint; one of an earlier version has no sums."""
        if SHARES in meta:
            self._counted, self._sums = meta[SHARES]["steps"], np.array(meta[SHARES]["sums"])

    def percent(self, shares) -> dict[str, float]:
        """Returns shares [K] in percent by class."""
        return dict(zip(self._config.data.classes, (100 * np.asarray(shares, float)).tolist(), strict=True))

    def count(self, step: int, shares: np.ndarray) -> list[str]:
        """Enters the shares [K] of the step that led to `step`; returns lines for the log, at the end of a period."""
        if step > self._warmup:
            self._counted, self._sums = self._counted + 1, self._sums + shares
        if step % self._period:
            return []
        counted, sums = self._counted, self._sums
        self._counted, self._sums = 0, np.zeros(len(sums))
        if counted < _LEAST_STEPS:  # The warm-up ended within the period.
            return []
        smallest = np.argsort(sums, kind="stable")[:_LEAST_CLASSES]
        shown = ", ".join(f"{self._classes[k]} {100 * sums[k] / counted:.3g}" for k in smallest)
        lines = [f"step {step}: least pseudo-labeled in {counted} steps, in percent of the pixels: {shown}"]
        return lines + self._warning(step, counted, np.flatnonzero(sums == 0))

    def _warning(self, step: int, counted: int, classes: np.ndarray) -> list[str]:
        """Returns the line about classes without a pseudo-label, if the labeled images may hold any of them."""
        pixels = self._config.data.class_pixels
        missing = [self._classes[k] for k in classes if not pixels or pixels[k]]
        if not missing:
            return []
        return [
            f"WARNING: step {step}: in {counted} steps no pixel was pseudo-labeled as {first_names(missing)}; such a "
            f"class may be unlearned. What may help: {'; '.join(self._advice())}"
        ]

    def _advice(self) -> list[str]:
        """Returns settings that the run does not have, by which rare classes may come back."""
        method, data, views = self._config.method, self._config.data, self._config.views
        lower = {"class_aware": "class_aware_floor", "threshold": "threshold"}.get(method.selection)
        advice = [f"config.method.{lower} below {method[lower]:g}"] if lower and method[lower] else []
        if method.selection != "adaptive":
            advice.append("config.method.selection=adaptive")
        if not method.align_classes:
            advice.append("config.method.align_classes=True")
        if not method.class_weight_power:
            advice.append("config.method.class_weight_power=0.5")
        if data.labeled_sampling != "rare":
            advice.append("config.data.labeled_sampling=rare")
        if method.strong_views and views.mix_partner != "labeled":
            advice.append("config.views.mix_partner=labeled with config.views.paste_classes=1")
        elif method.strong_views and not views.paste_classes:
            advice.append("config.views.paste_classes=1")
        return advice or ["more labeled images of the class"]
