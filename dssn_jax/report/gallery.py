"""Pictures for the report: best and worst validation images, and training images with their views and pseudo-labels."""

import base64
import functools
import io
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from dssn_jax import sharding, visualize
from dssn_jax.evaluation import metrics
from dssn_jax.evaluation.evaluate import Evaluator, log_progress
from dssn_jax.learner import learner as learner_lib
from dssn_jax.learner.learner import Learner
from dssn_jax.learner.state import deployed
from dssn_jax.report.runs import Run
from dssn_jax.training.image_summaries import ImageSummaries
from dssn_jax.workdir.logs import logger
from dssn_jax.workdir.restore import Restored, restore
from input_pipeline.batch import Batch
from input_pipeline.errors import UserError, printable
from input_pipeline.pipeline import run_length, train_dataset
from input_pipeline.sources.open import Source, Sources, open_source

SHOWN = 4  # Best, worst and training images of each kind.
LONGEST = 480  # Longer side of a picture on the page, pixels; larger pictures are reduced.


class Picture(NamedTuple):
    """An encoded picture with its caption."""

    caption: str
    uri: str  # A data URI.
    width: int  # Pixels.
    height: int  # Pixels.


class Row(NamedTuple):
    """The pictures of one image."""

    title: str
    pictures: list[Picture]


class Gallery(NamedTuple):
    """The pictures of one run."""

    note: str  # Checkpoint and network of the pictures, or why there are none.
    validation: dict[str, list[Row]] = {}  # "Best" and "Worst".
    training: dict[str, list[Row]] = {}  # "Unlabeled images" and "Labeled images".


class ScoredImage(NamedTuple):
    """A validation image with its prediction."""

    name: str
    miou: float  # In percent, over the classes in the image or in the prediction.
    image: np.ndarray  # uint8 [H, W, 3]
    label: np.ndarray  # uint8 [H, W]
    prediction: np.ndarray  # uint8 [H, W]


def draw(run: Run, images: int) -> Gallery:
    """Draws pictures of the best checkpoint of `run`, or the latest if nothing was evaluated yet.

    The best and the worst are chosen among at most `images` validation images. If the data or the checkpoint cannot be
    used, the gallery has no pictures and its note has the reason.
    """
    if not images:
        return Gallery("No pictures: --images=0.")
    try:
        val = open_source(run.config, "val")
        restored = restore(run.workdir, None, config=run.config, mesh=sharding.make_mesh(jax.local_devices()[:1]))
        note, validation = _draw_validation(restored, val, images, run.label)
    except (UserError, OSError) as error:
        logger.warning("%s: no pictures: %s", run.label, error)
        return Gallery(f"No pictures: {error}")
    logger.info("%s: drawing training images as the training step reads them; their program is compiled", run.label)
    try:
        return Gallery(note, validation, _draw_training(restored, val))
    except (UserError, OSError) as error:
        logger.warning("%s: no pictures of training images: %s", run.label, error)
        return Gallery(f"{note} No pictures of training images: {error}", validation)


def _draw_validation(restored: Restored, val: Source, images: int, label: str) -> tuple[str, dict[str, list[Row]]]:
    """Returns the note of the gallery, and the rows of the best and the worst validation images."""
    network = deployed(restored.networks)
    indices = np.unique(np.linspace(0, len(val) - 1, min(images, len(val))).round().astype(int)).tolist()
    logger.info("%s: scoring %d validation images for the report", label, len(indices))
    scored = score_images(restored.learner, restored.networks[network], val, indices)
    note = f"Predictions of the {network} at step {restored.step}: best and worst of {len(indices)} validation images"
    note += f", spread evenly over all {len(val)}." if len(indices) < len(val) else "."
    overlay = _overlay(restored.learner)
    shown = min(SHOWN, len(scored) // 2)
    ends = {"Best": scored[::-1][:shown], "Worst": scored[:shown]}
    return note, {title: [_validation_row(image, overlay) for image in end] for title, end in ends.items()}


def score_images(learner: Learner, variables: dict, val: Source, indices: list[int]) -> list[ScoredImage]:
    """Predicts records of `val` and returns the `SHOWN` worst and the `SHOWN` best, in ascending order of mean IoU."""
    config, evaluator, progress = learner.config, Evaluator(learner), log_progress(len(indices))
    confusion = functools.partial(
        metrics.confusion_matrix, num_classes=len(config.data.classes), ignore=config.data.ignore
    )
    confusions_of = jax.jit(jax.vmap(confusion))
    done, kept = 0, []
    for batch in evaluator.batches(val, indices=indices):
        predictions = evaluator.class_maps(variables, batch)
        confusions = np.asarray(confusions_of(predictions, batch.labels))
        for row, index in enumerate(batch.indices):
            miou = image_miou(confusions[row])
            if miou is not None:
                height, width = batch.sizes[row]
                arrays = (array[row, :height, :width] for array in (batch.images, batch.labels, predictions))
                kept.append(ScoredImage(val.name(index), miou, *arrays))
        kept.sort(key=lambda scored: scored.miou)
        kept = kept[:SHOWN] + kept[SHOWN:][-SHOWN:]  # The others need not stay in memory.
        done += len(batch.indices)
        progress(done)
    return kept


def image_miou(confusion: np.ndarray) -> float | None:
    """Returns the mean IoU, in percent, over the classes in an image or its prediction; None if all is ignored."""
    present = confusion.sum(0) + confusion.sum(1) > 0
    return 100 * float(metrics.iou(confusion)[present].mean()) if present.any() else None


def _validation_row(scored: ScoredImage, overlay: Callable) -> Row:
    pictures = {
        "image": scored.image,
        "truth": overlay(scored.image, scored.label),
        "prediction": overlay(scored.image, scored.prediction),
    }
    return Row(f"{printable(scored.name)}: {scored.miou:.1f}", [_picture(*item) for item in pictures.items()])


def _draw_training(restored: Restored, val: Source) -> dict[str, list[Row]]:
    """Draws the first images of the batch of the step before the checkpoint, with the views of that step."""
    config = restored.learner.config
    sources = Sources(open_source(config, "labeled"), open_source(config, "unlabeled"), val)
    # With the length of the run, on which the schedules of the method depend.
    learner = learner_lib.build(config, restored.learner.mesh, run_length(sources, config))
    batch = train_dataset(sources, config)[max(restored.step - 1, 0)]
    batch = Batch(*(None if field is None else field[:SHOWN] for field in batch))
    state = learner.init_state().replace(
        step=np.int32(restored.step), student=restored.networks["student"], teacher=restored.networks.get("teacher")
    )
    views = ImageSummaries(learner, SHOWN).views(state, batch)
    colorize, overlay = _colorize(learner), _overlay(learner)
    rows = {}
    if "image_u" in views:
        columns = {"weak view": views["image_u"]}
        columns |= {f"strong view {i + 1}": image for i, image in enumerate(views["strong"])}
        columns["pseudo-label"] = colorize(views["pseudo_label"])
        columns["selected"] = visualize.mask(views["selected"])
        columns["prediction"] = overlay(views["image_u"], views["prediction_u"])
        rows["Unlabeled images"] = _rows(columns)
    rows["Labeled images"] = _rows({
        "weak view": views["image_x"],
        "truth": overlay(views["image_x"], views["label_x"]),
        "prediction": overlay(views["image_x"], views["prediction_x"]),
    })  # fmt: skip
    return rows


def _rows(columns: dict[str, np.ndarray]) -> list[Row]:
    """Turns columns of n pictures by caption, each uint8 [n, H, W, 3], into n rows."""
    count = len(next(iter(columns.values())))
    return [Row("", [_picture(caption, column[i]) for caption, column in columns.items()]) for i in range(count)]


def _colorize(learner: Learner) -> Callable:
    return functools.partial(visualize.colorize, num_classes=len(learner.config.data.classes))


def _overlay(learner: Learner) -> Callable:
    return functools.partial(visualize.overlay, num_classes=len(learner.config.data.classes))


def _picture(caption: str, image: np.ndarray) -> Picture:
    """Encodes uint8 [H, W, 3]: small pictures without loss as PNG, others as JPEG of at most `LONGEST` pixels."""
    picture, file = Image.fromarray(image), io.BytesIO()
    small = max(picture.size) <= LONGEST // 3
    picture.thumbnail((LONGEST, LONGEST))
    if small:
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "JPEG", quality=88, subsampling=0)
    kind = "png" if small else "jpeg"
    return Picture(caption, f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", *picture.size)
