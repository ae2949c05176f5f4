"""Class maps of any images: `--mode=predict`. Class ids as palette PNGs, overlays, and confidence if wanted."""

import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from configs.checks import ConfigError
from dssn_jax import sharding
from dssn_jax import visualize as pictures
from dssn_jax.evaluation import evaluate
from dssn_jax.workdir import files, recorder
from dssn_jax.workdir import restore as saved_run
from dssn_jax.workdir.recorder import logger
from input_pipeline.errors import UserError
from input_pipeline.sources.images import find_images

CLASS_IDS, OVERLAYS, CONFIDENCE = "class_ids", "overlays", "confidence"


class UnreadableError(UserError):
    """Some images could not be read: the message names them. The others were predicted."""


def predict(
    config,
    workdir: str,
    images: str,
    target: str,
    which: str = "best",
    network: str | None = None,
    confidence: bool = False,
) -> int:
    """Predicts `images` with a network of a run; returns how many were predicted.

    Writes, under the folder `target` and at the images' relative paths, class_ids/*.png (8-bit ids with the data set's
    palette, at the image's size), overlays/*.jpg (the image under the colors) and confidence/*.png (probability of the
    predicted class, 0 to 255).

    Args:
      config: of the run; None: that in the work directory.
      workdir: of the run.
      images: an image, a folder or a list; see `find_images`.
      target: folder; existing pictures in it are replaced.
      which: checkpoint: best, latest or a step.
      network: student or teacher; None is the teacher if there is one.
      confidence: whether to write it.

    Raises:
      UnreadableError, at the end, if an image could not be read. Before anything is written: CheckpointError,
      WorkdirError, ConfigError or DataError.
    """
    recorder.log_to(None)
    config = saved_run.read_config(workdir) if config is None else config
    source, names = find_images(images, config.data.root)
    targets = _targets(names)
    mesh = sharding.make_mesh()
    saved = saved_run.restore_networks(workdir, which, config, mesh)
    config = saved.config
    network = saved_run.choose_network(workdir, saved.variables, network)
    logger.info("predicting %d images with the %s of step %d of %s", len(source.readable), network, saved.step, workdir)

    errors = list(source.errors)
    evaluator = evaluate.Evaluator(saved.model, config, mesh)
    groups = evaluator.groups(source, indices=source.readable, on_error=lambda _, error: errors.append(error))
    writer = Writer(epath.Path(target), len(config.data.classes), confidence)
    done = 0
    with (
        ThreadPoolExecutor(config.data.threads) as pool,
        tqdm(total=len(source.readable), unit="image", file=sys.stdout, mininterval=1) as bar,
    ):
        for group in groups:
            maps, certainties = evaluator.predict(saved.variables[network], group)
            pictures_of = [
                (targets[index], *(array[row, :height, :width] for array in (group.images, maps, certainties)))
                for row, (index, (height, width)) in enumerate(zip(group.indices, group.sizes, strict=False))
            ]
            list(pool.map(lambda each: writer(*each), pictures_of))  # noqa: B023
            done += len(group.indices)
            bar.update(len(group.indices))
    logger.info("wrote %d predictions to %s", done, target)
    if errors:
        raise UnreadableError("\n".join([f"{len(errors)} of {len(source)} images were skipped:", *map(str, errors)]))
    return done


class Writer:
    """Writes what is predicted of an image, each file whole or not at all."""

    def __init__(self, target: epath.Path, num_classes: int, confidence: bool):
        self._target, self._num_classes, self._confidence = target, num_classes, confidence
        self._palette = pictures.palette(256).ravel().tolist()

    def __call__(self, name: str, image: np.ndarray, class_map: np.ndarray, certainty: np.ndarray) -> None:
        """Takes the relative path without suffix, uint8 [H, W, 3], class ids uint8 [H, W] and confidence uint8."""
        ids = Image.fromarray(class_map)
        ids.putpalette(self._palette)  # Which makes it an image of mode P.
        self._save(ids, CLASS_IDS, name, ".png")
        overlay = pictures.overlay(image, class_map, self._num_classes)
        self._save(Image.fromarray(overlay), OVERLAYS, name, ".jpg", quality=92)
        if self._confidence:
            self._save(Image.fromarray(certainty), CONFIDENCE, name, ".png")

    def _save(self, picture: Image.Image, kind: str, name: str, suffix: str, **options) -> None:
        path = self._target / kind / (name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(path) as part:
            picture.save(part, format="JPEG" if suffix == ".jpg" else "PNG", **options)


def _targets(names: list[str]) -> list[str]:
    """The relative path, without suffix, that the pictures of each image get; raises ConfigError for a double one."""
    found: dict[str, str] = {}
    for name in names:
        parts = [part for part in pathlib.PurePath(name).parts if part not in ("/", "..")]
        stem = str(pathlib.PurePath(*parts).with_suffix(""))
        if stem in found:
            raise ConfigError(f"the predictions of {found[stem]} and {name} would both be {stem}.png")
        found[stem] = name
    return list(found)
