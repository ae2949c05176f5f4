"""Decodes every image and mask of a data set once and records what `check` needs to know, errors included."""

import collections
import hashlib
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from input_pipeline import decode
from input_pipeline.decode import Encoded
from input_pipeline.errors import DataError
from input_pipeline.labels import Labels
from input_pipeline.sources.encoded import check_sizes


class MaskInfo(NamedTuple):
    """A decoded mask, or why it is unusable: then `defect` is a kind of finding and `details` explain it."""

    name: str
    defect: str = ""  # unreadable_masks | size_mismatches | uncovered_values
    details: tuple[str, ...] = ()  # The error message; for uncovered_values, the values.
    pixels: np.ndarray | None = None  # int64 [classes], pixels per class; None with a defect.
    ignored: int = 0  # Pixels.


class ImageInfo(NamedTuple):
    """A decoded image, or its error, and its masks."""

    name: str
    error: str = ""
    size: tuple[int, int] = (0, 0)  # Height and width.
    gray: bool = False  # All channels are equal.
    digest: bytes = b""  # Hash of the pixels.
    masks: dict[str, MaskInfo] = {}  # By name.


def inspect_files(
    pairs: Iterable[tuple[Encoded, Encoded | None]], labels: Labels, threads: int
) -> dict[str, ImageInfo]:
    """Decodes each file of (image, mask) pairs once, with a progress bar; returns the images by name."""
    images, masks_of = {}, collections.defaultdict(dict)
    for image, mask in pairs:
        images[image.where] = image
        if mask is not None:
            masks_of[image.where][mask.where] = mask

    def inspect(image: Encoded) -> ImageInfo:
        return _inspect_image(image, list(masks_of[image.where].values()), labels)

    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(inspect, images.values())
        progress = tqdm(results, total=len(images), unit="image", file=sys.stdout, mininterval=1)
        return {result.name: result for result in progress}


def _inspect_image(image: Encoded, masks: Sequence[Encoded], labels: Labels) -> ImageInfo:
    try:
        pixels = decode.image(image)
    except DataError as error:
        infos = {mask.where: _inspect_mask(mask, image, None, labels) for mask in masks}
        return ImageInfo(image.where, str(error), masks=infos)
    size = pixels.shape[:2]
    return ImageInfo(
        image.where,
        size=size,
        gray=bool((pixels[..., :1] == pixels[..., 1:]).all()),
        digest=hashlib.blake2b(pixels.tobytes() + repr(size).encode(), digest_size=16).digest(),
        masks={mask.where: _inspect_mask(mask, image, size, labels) for mask in masks},
    )


def _inspect_mask(mask: Encoded, image: Encoded, size: tuple[int, int] | None, labels: Labels) -> MaskInfo:
    """Decodes a mask; `size` is that of the image, None if the image is unreadable."""
    defect = "unreadable_masks"
    try:
        values = labels.raw(mask)
        defect = "size_mismatches"
        if size is not None:
            check_sizes(image, size, mask, values.shape)
    except DataError as error:
        return MaskInfo(mask.where, defect, (str(error),))
    uncovered = labels.uncovered(values)
    if uncovered:
        return MaskInfo(mask.where, "uncovered_values", tuple(map(labels.text, uncovered)))
    counts = np.bincount(labels.to_ids(values, mask.where).ravel(), minlength=256)
    ignored, counts[labels.ignore] = int(counts[labels.ignore]), 0
    return MaskInfo(mask.where, pixels=counts[: len(labels.classes)], ignored=ignored)
