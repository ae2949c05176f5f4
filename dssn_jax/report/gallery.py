"""Pictures for the page: validation images with the best and the worst prediction, and what training sees."""

import base64
import functools
import io
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from configs import checks
from dssn_jax import visualize as pictures
from dssn_jax.evaluation import evaluate, metrics
from dssn_jax.learner import learner as experiment
from dssn_jax.report.runs import Run
from dssn_jax.training import image_summaries as panels
from dssn_jax.workdir import checkpoint
from dssn_jax.workdir.recorder import logger
from input_pipeline.errors import DataError
from input_pipeline.pipeline import train_dataset
from input_pipeline.sources.open import Source

SHOWN = 4  # Best and worst validation images each, and training images.
LONGEST = 480  # Pixels of the longer side of a picture on the page; larger ones are made smaller.


class Picture(NamedTuple):
    """A picture with a line under it."""

    caption: str
    uri: str  # A data URI.
    width: int  # Pixels, as `height`.
    height: int


class Row(NamedTuple):
    """Pictures of one image."""

    title: str
    pictures: list[Picture]


class Gallery(NamedTuple):
    """The pictures of one run, and words about them."""

    note: str  # From which checkpoint and network they are, or why there are none.
    validation: dict[str, list[Row]] = {}  # "Best" and "Worst".
    training: dict[str, list[Row]] = {}  # "Unlabeled images" and "Labeled images".


class Scored(NamedTuple):
    """A validation image with its prediction."""

    name: str
    miou: float  # Per cent, over the classes that are in the image or in the prediction.
    image: np.ndarray  # uint8 [H, W, 3]
    label: np.ndarray  # uint8 [H, W]
    prediction: np.ndarray  # uint8 [H, W]


def draw(run: Run, images: int) -> Gallery:
    """Predicts with the best checkpoint of `run` (the latest if none was evaluated) and draws what comes out.

    At most `images` validation images are looked at. A run whose data or checkpoint cannot be used gives a gallery
    without pictures that says why.
    """
    if not images:
        return Gallery("No pictures were asked for.")
    try:
        return _draw(run, images)
    except (checks.ConfigError, DataError, checkpoint.CheckpointError) as error:
        logger.warning("%s: no pictures: %s", run.label, error)
        return Gallery(f"No pictures: {error}")


def _draw(run: Run, images: int) -> Gallery:
    parts = experiment.build(run.config, jax.local_devices()[:1])
    saved = checkpoint.Checkpointer(run.workdir, read_only=True)
    try:
        step = saved.resolve("best" if run.networks else "latest")
        state, _ = saved.restore(step, parts.abstract_state(), run.config)
    finally:
        saved.close()
    network, variables = list(state.networks().items())[-1]
    val = _Some(parts.sources.val, images)
    scored = score(parts, variables, val, run.label)
    note = f"Predicted by the {network} of step {step}. Best and worst of {len(val)} validation images"
    note += f", spread evenly over all {len(parts.sources.val)}." if len(val) < len(parts.sources.val) else "."
    colors = functools.partial(_overlaid, num_classes=len(run.classes))
    shown = min(SHOWN, len(scored) // 2)
    ends = {"Best": scored[::-1][:shown], "Worst": scored[:shown]}
    return Gallery(
        note,
        {title: [_validation_row(each, colors) for each in end] for title, end in ends.items()},
        _training_rows(parts, state, len(run.classes)),
    )


class _Some:
    """At most so many records of a source, spread evenly over it; an `Source`."""

    def __init__(self, source: Source, count: int):
        self._source = source
        self._indices = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)).tolist()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._source[self._indices[index]]

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])

    def size(self, index: int) -> tuple[int, int]:
        return self._source.size(self._indices[index])


def score(parts: experiment.Experiment, variables: dict, val, label: str) -> list[Scored]:
    """Predicts the images of the source `val` whole; returns the `SHOWN` worst and best ones, the worst first."""
    config = parts.config
    evaluator = evaluate.Evaluator(parts.model, config, parts.mesh)
    logger.info("%s: scoring %d validation images for the report", label, len(val))
    progress, done, kept = evaluate.log_progress(len(val)), 0, []
    for group in evaluator.groups(val):
        maps = evaluator.class_maps(variables, group)
        for row, name in enumerate(group.names):
            height, width = group.sizes[row]
            image, label, found = (array[row, :height, :width] for array in (group.images, group.labels, maps))
            miou = image_miou(found, label, len(config.data.classes), config.data.ignore)
            if miou is not None:
                kept.append(Scored(name, miou, image, label, found))
        kept.sort(key=lambda scored: scored.miou)
        kept = kept[:SHOWN] + kept[SHOWN:][-SHOWN:]  # The others need not stay in memory.
        done += len(group.names)
        progress(done)
    return kept


def image_miou(prediction: np.ndarray, label: np.ndarray, num_classes: int, ignore: int) -> float | None:
    """Mean IoU of one image, per cent, over the classes in it or in its prediction; None if every pixel is ignored."""
    valid = label != ignore
    cells = label[valid].astype(int) * num_classes + prediction[valid]
    confusion = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
    there = confusion.sum(0) + confusion.sum(1) > 0
    return 100 * float(metrics.iou(confusion)[there].mean()) if there.any() else None


def _validation_row(scored: Scored, colors) -> Row:
    shown = {
        "image": scored.image,
        "truth": colors(scored.image, scored.label),
        "prediction": colors(scored.image, scored.prediction),
    }
    return Row(f"{scored.name}: {scored.miou:.1f}", [_picture(*item) for item in shown.items()])


def _training_rows(parts: experiment.Experiment, state, num_classes: int) -> dict[str, list[Row]]:
    """What the step before the checkpoint saw of its first images."""
    dataset = train_dataset(parts.sources, parts.config)
    batch = {name: array[:SHOWN] for name, array in dataset[max(int(state.step) - 1, 0)].items()}
    seen = panels.Panels(parts, SHOWN).seen(state, batch)
    color = functools.partial(pictures.colorize, num_classes=num_classes)
    overlaid = functools.partial(_overlaid, num_classes=num_classes)
    rows = {}
    if "pseudo_label" in seen:
        views = {"weak view": seen["image_u"]}
        views |= {f"strong view {i}": seen[f"image_s{i}"] for i in (1, 2) if f"image_s{i}" in seen}
        views["pseudo-label"] = color(seen["pseudo_label"])
        views["selected"] = pictures.mask(seen["selected"])
        views["prediction"] = overlaid(seen["image_u"], seen["prediction_u"])
        rows["Unlabeled images"] = _rows(views)
    rows["Labeled images"] = _rows({
        "weak view": seen["image_x"],
        "truth": overlaid(seen["image_x"], seen["label_x"]),
        "prediction": overlaid(seen["image_x"], seen["prediction_x"]),
    })  # fmt: skip
    return rows


def _rows(columns: dict[str, np.ndarray]) -> list[Row]:
    """Columns of pictures by caption, each uint8 [n, H, W, 3] -> a row for each of the n images."""
    count = len(next(iter(columns.values())))
    return [Row("", [_picture(caption, column[i]) for caption, column in columns.items()]) for i in range(count)]


def _overlaid(image: np.ndarray, class_map: np.ndarray, num_classes: int) -> np.ndarray:
    return pictures.overlay(image, class_map, num_classes)


def _picture(caption: str, image: np.ndarray) -> Picture:
    """Encodes uint8 [H, W, 3]: small pictures as they are (PNG), others as JPEG of at most `LONGEST` pixels."""
    picture, file = Image.fromarray(image), io.BytesIO()
    small = max(picture.size) <= LONGEST // 3
    picture.thumbnail((LONGEST, LONGEST))
    if small:
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "JPEG", quality=88, subsampling=0)
    kind = "png" if small else "jpeg"
    return Picture(caption, f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", *picture.size)
