"""Opens the sources of a configuration: random access to records {"image": uint8 [H, W, 3] RGB, "label": uint8 [H, W]}.

Sources can be pickled (worker processes get a copy) and read from many threads.
"""

import functools
import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from input_pipeline import layout
from input_pipeline.class_names import SHAPES_CLASSES
from input_pipeline.errors import DataError, first_messages, printable
from input_pipeline.labels import Labels
from input_pipeline.sources import records
from input_pipeline.sources import tfds as tfds_source
from input_pipeline.sources.folder import FolderSource
from input_pipeline.sources.records import RecordsSource
from input_pipeline.sources.shapes import ShapesSource
from input_pipeline.sources.tfds import TfdsSource


class Source(Protocol):
    """Random access to images and, in a labeled source, labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns {"image": uint8 [H, W, 3], "label": uint8 [H, W]}, without "label" from an unlabeled source."""

    def label(self, index: int) -> np.ndarray:
        """Returns the label alone, in a labeled source."""

    def name(self, index: int) -> str:
        """Returns the path of the image as the user wrote it."""

    def size(self, index: int) -> tuple[int, int]:
        """Returns (H, W) without decoding the image."""


class Sources(NamedTuple):
    """The three sources of a run. An epoch is one pass over `unlabeled`, also if the method does not read it."""

    labeled: Source
    unlabeled: Source
    val: Source


def digest(source: Source) -> str:
    """Returns a digest of the names of the images and their order, on which the batches depend."""
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
    return Sources(*_open(config.data, Sources._fields))


def open_source(config, split: str) -> Source:
    """Opens one source of a run, without the lists, folders and files of the other splits.

    Args:
      config: the whole configuration.
      split: a field of `Sources`: "labeled" | "unlabeled" | "val".

    Raises:
      DataError: as `open_sources`.
    """
    return _open(config.data, (split,))[0]


def _open(data, splits: Sequence[str]) -> list[Source]:
    if data.source not in SOURCES:
        raise DataError(f"config.data.source is {printable(repr(data.source), 100)}; known: {', '.join(SOURCES)}")
    return SOURCES[data.source](data, splits)


def _open_listed(data, splits: Sequence[str]) -> list[Source]:
    """Opens the files, or the packed records, that lists or folders name."""
    root = layout.find_root(data)
    if data.source == "folder":
        make = functools.partial(FolderSource, root)
    else:
        index = records.read_index(root)
        records.check_shards(root, index)
        make = functools.partial(RecordsSource, root, index)
    labels = Labels.from_config(data)
    images = layout.find_layout(data, splits)
    if images.defects:
        raise DataError(first_messages(images.defects))
    sources = [make(*getattr(images, split), _labels_of(split, labels)) for split in splits]
    for source in sources:
        source.check_headers()
    return sources


def _labels_of(split: str, labels: Labels) -> Labels | None:
    return None if split == "unlabeled" else labels


def _open_tfds(data, splits: Sequence[str]) -> list[Source]:
    labels, keys = Labels.from_config(data), data.tfds
    dataset = tfds_source.open_dataset(keys.name, keys.data_dir)
    sources = [TfdsSource(dataset, keys[split], keys.image, keys.label, _labels_of(split, labels)) for split in splits]
    for source in sources:
        if source.labels is not None:  # Headers are in the records: without a mask there is nothing to compare.
            source.check_headers()
    return sources


def _open_shapes(data, splits: Sequence[str]) -> list[Source]:
    if tuple(data.classes) != SHAPES_CLASSES:
        raise DataError(f"config.data.classes is {tuple(data.classes)}; the generated shapes have {SHAPES_CLASSES}")
    shapes = data.shapes
    if not 0 < shapes.labeled <= shapes.unlabeled or shapes.val < 1:
        raise DataError(
            f"config.data.shapes: labeled {shapes.labeled}, unlabeled {shapes.unlabeled}, val {shapes.val}; "
            "expected 1 <= labeled <= unlabeled and val >= 1"
        )
    return [
        ShapesSource(
            shapes.size, shapes[split], shapes.seed, part="val" if split == "val" else "train",
            labeled=split != "unlabeled",
        )
        for split in splits
    ]  # fmt: skip


# The values of `config.data.source`.
SOURCES = {"folder": _open_listed, "array_record": _open_listed, "tfds": _open_tfds, "shapes": _open_shapes}
