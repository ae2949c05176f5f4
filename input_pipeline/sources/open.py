"""Random-access sources of images: a record is {"image": uint8 [H, W, 3] RGB, "label": uint8 [H, W]}.

Sources are picklable (worker processes get a copy) and safe to read from many threads.
"""

import functools
import hashlib
import os
from typing import NamedTuple, Protocol

import numpy as np

from input_pipeline import layout
from input_pipeline.errors import DataError
from input_pipeline.labels import Labels
from input_pipeline.sources import records
from input_pipeline.sources import tfds as tfds_source
from input_pipeline.sources.folder import FolderSource
from input_pipeline.sources.records import RecordsSource
from input_pipeline.sources.shapes import SHAPES_CLASSES, ShapesSource
from input_pipeline.sources.tfds import TfdsSource

SOURCES = ("folder", "array_record", "tfds", "shapes")


class Source(Protocol):
    """What the pipelines read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns {"image": uint8 [H, W, 3], "label": uint8 [H, W]}; an unlabeled source has no "label"."""

    def name(self, index: int) -> str:
        """Returns the path of the image, as the user wrote it."""

    def size(self, index: int) -> tuple[int, int]:
        """Returns (H, W) without decoding the image."""


class Sources(NamedTuple):
    """The three sources of a run. `unlabeled` is one pass of an epoch, whatever the method reads from it."""

    labeled: Source
    unlabeled: Source
    val: Source


def digest(source: Source) -> str:
    """Returns a digest of the names of the images and of their order, which is what batches depend on."""
    names = hashlib.sha256()
    for index in range(len(source)):
        names.update(os.fsencode(source.name(index)) + b"\n")
    return names.hexdigest()


def open_sources(config) -> Sources:
    """Opens the labeled, unlabeled and validation sources of a run and checks all file headers.

    Args:
      config: the whole configuration; `config.data` says where the data are.

    Raises:
      DataError: unknown source, or data that cannot be used.
    """
    data = config.data
    if data.source not in SOURCES:
        raise DataError(f"config.data.source is {data.source!r}; known: {', '.join(SOURCES)}")
    return _OPEN[data.source](data)


def _open_listed(data) -> Sources:
    """Opens what lists, or folders, name: as files, or packed."""
    root = layout.find_root(data)
    if data.source == "folder":
        make = functools.partial(FolderSource, root)
    else:
        index = records.read_index(root)
        records.check_shards(root, index)
        make = functools.partial(RecordsSource, root, index)
    labels = Labels.from_config(data)
    found = layout.find_layout(data)
    if found.defects:
        raise DataError(layout.first_lines(found.defects))
    sources = Sources(make(*found.labeled, labels), make(*found.unlabeled, None), make(*found.val, labels))
    for source in sources:
        source.check_headers()
    return sources


def _open_tfds(data) -> Sources:
    labels, keys = Labels.from_config(data), data.tfds
    dataset = tfds_source.open_dataset(keys.name, keys.data_dir)

    def make(split: str, labels: Labels | None) -> TfdsSource:
        return TfdsSource(dataset, split, keys.image, keys.label, labels)

    sources = Sources(make(keys.labeled, labels), make(keys.unlabeled, None), make(keys.val, labels))
    # Headers are in the records: of those without a mask, which are most, there is nothing to compare.
    for source in (sources.labeled, sources.val):
        source.check_headers()
    return sources


def _open_shapes(data) -> Sources:
    if tuple(data.classes) != SHAPES_CLASSES:
        raise DataError(f"config.data.classes is {tuple(data.classes)}; the generated shapes have {SHAPES_CLASSES}")
    shapes = data.shapes
    if not 0 < shapes.labeled <= shapes.unlabeled or shapes.val < 1:
        raise DataError(
            f"config.data.shapes: labeled {shapes.labeled}, unlabeled {shapes.unlabeled}, val {shapes.val}; "
            "expected 1 <= labeled <= unlabeled and val >= 1"
        )
    return Sources(
        labeled=ShapesSource(shapes.size, shapes.labeled, shapes.seed, part="train", labeled=True),
        unlabeled=ShapesSource(shapes.size, shapes.unlabeled, shapes.seed, part="train", labeled=False),
        val=ShapesSource(shapes.size, shapes.val, shapes.seed, part="val", labeled=True),
    )


_OPEN = {"folder": _open_listed, "array_record": _open_listed, "tfds": _open_tfds, "shapes": _open_shapes}
