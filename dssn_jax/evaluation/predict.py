"""Class maps of arbitrary images: palette PNGs, overlays and, if asked for, confidence; `--mode=predict`."""

import os
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from configs.checks import ConfigError
from dssn_jax import visualize
from dssn_jax.evaluation.evaluate import Evaluator, MemoryLimitError
from dssn_jax.workdir import files, records
from dssn_jax.workdir.logs import logger
from dssn_jax.workdir.restore import pick_network, restore
from input_pipeline.errors import UserError, printable
from input_pipeline.eval_batches import EvalBatch
from input_pipeline.sources.folder import ImagesSource
from input_pipeline.sources.images import find_images

CLASS_IDS, OVERLAYS, CONFIDENCE = "class_ids", "overlays", "confidence"
DESCRIPTION, MADE_BY = "predictions.json", "dssn_jax predict"  # Marks the folder, into which a later prediction may go.


class UnreadableError(UserError):
    """Some images could not be read, or are too large: the message names them. The others were predicted."""


def predict(
    workdir: epath.PathLike,
    images: str,
    *,
    to: epath.PathLike,
    config=None,
    checkpoint: str = "best",
    network: str | None = None,
    confidence: bool = False,
) -> int:
    """Predicts `images` with a network of a run; returns how many were predicted.

    Writes, under the folder `to` and at the relative paths of the images, class_ids/*.png (8-bit ids with the palette
    of the data set, at the size of the image), overlays/*.jpg (the image under the colors) and confidence/*.png (the
    probability of the predicted class, 0 to 255); predictions.json names the run.

    Args:
      workdir: of the run.
      images: an image, a folder or a list; see `find_images`.
      to: folder that does not exist, is empty, or holds predictions, which are replaced; not one that the images are
        in, or that is in theirs.
      config: of the run; None: the one in the work directory.
      checkpoint: "best", "latest" or a step.
      network: "student" | "teacher"; None: the teacher if there is one.
      confidence: whether to write it.

    Raises:
      UnreadableError, at the end, if an image could not be read, or needs more memory than there is. Before anything
      is written: CheckpointError, WorkdirError, ConfigError or DataError.
    """
    config = records.read_config(workdir) if config is None else config
    source, names = find_images(images, config.data.root)
    _check_output(epath.Path(to), images, source)
    writer = Writer(epath.Path(to), _output_names(names), len(config.data.classes), confidence)
    learner, step, networks, _ = restore(workdir, checkpoint, config=config)
    evaluator, network = Evaluator(learner), pick_network(networks, network)
    logger.info("predicting %d images with the %s of step %d of %s", len(source.readable), network, step, workdir)

    errors, done = list(source.errors), 0
    batches = evaluator.batches(
        source, probabilities=True, indices=source.readable, on_error=lambda _, error: errors.append(error)
    )
    epath.Path(to).mkdir(parents=True, exist_ok=True)
    description = {"made_by": MADE_BY, "name": config.name, "network": network, "step": step}
    records.write_json(epath.Path(to) / DESCRIPTION, description | {"classes": list(config.data.classes)})
    with (
        ThreadPoolExecutor(config.data.threads) as pool,
        tqdm(total=len(source.readable), unit="image", file=sys.stdout, mininterval=1) as bar,
    ):
        for batch in batches:
            bar.update(len(batch.indices))
            try:
                predicted = evaluator.predict(networks[network], batch)
            except MemoryLimitError as error:
                errors += [f"{printable(source.name(index))}: {error}" for index in batch.indices]
                continue
            writer.write(pool, batch, *predicted)
            done += len(batch.indices)
    logger.info("wrote %d predictions to %s", done, to)
    if errors:
        raise UnreadableError("\n".join([f"{len(errors)} of {len(source)} images were skipped:", *map(str, errors)]))
    return done


class Writer:
    """Writes the predictions of images, each file atomically."""

    def __init__(self, folder: epath.Path, names: list[str], num_classes: int, confidence: bool):
        """Takes the relative path without suffix for the pictures of each image."""
        self._folder, self._names, self._num_classes, self._confidence = folder, names, num_classes, confidence
        self._palette = visualize.palette(256).ravel().tolist()

    def write(self, pool: ThreadPoolExecutor, batch: EvalBatch, ids: np.ndarray, confidence: np.ndarray) -> None:
        """Writes the class ids and confidence, uint8 [rows, H, W], of a batch with the threads of `pool`."""
        list(pool.map(lambda row: self._write_row(row, batch, ids, confidence), range(len(batch.indices))))

    def _write_row(self, row: int, batch: EvalBatch, ids: np.ndarray, confidence: np.ndarray) -> None:
        name, (height, width) = self._names[batch.indices[row]], batch.sizes[row]
        image, class_map, certainty = (array[row, :height, :width] for array in (batch.images, ids, confidence))
        picture = Image.fromarray(class_map)
        picture.putpalette(self._palette)  # The image becomes one of mode P.
        self._save(picture, CLASS_IDS, name, ".png")
        overlay = visualize.overlay(image, class_map, self._num_classes)
        self._save(Image.fromarray(overlay), OVERLAYS, name, ".jpg", quality=92)
        if self._confidence:
            self._save(Image.fromarray(certainty), CONFIDENCE, name, ".png")

    def _save(self, picture: Image.Image, kind: str, name: str, suffix: str, **options) -> None:
        path = self._folder / kind / (name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(path) as part:
            picture.save(part, format="JPEG" if suffix == ".jpg" else "PNG", **options)


def _check_output(folder: epath.Path, images: str, source: ImagesSource) -> None:
    """Raises ConfigError if predictions in `folder` might replace files, or be taken for images the next time."""
    if not files.is_remote(folder):
        to = os.path.realpath(folder)
        paths = [os.path.realpath(entry.image) for entry in source.entries]
        inside = next((path for path in paths if path.startswith(os.path.join(to, ""))), None)
        if inside:
            raise ConfigError(f"--to={folder}: the image {printable(inside)} is in it; expected another folder")
        if os.path.isdir(images) and os.path.join(to, "").startswith(os.path.join(os.path.realpath(images), "")):
            raise ConfigError(
                f"--to={folder}: in the folder of the images, {images}, so that the next prediction would read these "
                "predictions; expected a folder outside of it"
            )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--to={folder}: is a file; expected a folder")
    if folder.exists() and any(folder.iterdir()):
        description = folder / DESCRIPTION
        if not description.is_file() or MADE_BY.encode() not in files.read_bytes(description):
            raise ConfigError(f"--to={folder}: neither empty nor a folder of predictions; expected a new folder")


def _output_names(names: list[str]) -> list[str]:
    """Returns the relative path, without suffix, of each image's pictures; raises ConfigError if two are equal."""
    outputs: dict[str, str] = {}
    for name in names:
        components = [part for part in pathlib.PurePath(name).parts if part not in ("/", "..")]
        stem = str(pathlib.PurePath(*components).with_suffix(""))
        if stem in outputs:
            raise ConfigError(f"the predictions of {outputs[stem]} and {name} would both be {stem}.png")
        outputs[stem] = name
    return list(outputs)
