"""From files to batches: sources, views and pipelines. NumPy, Pillow and grain only, never JAX.

    sources = open_sources(config)                            # Lists and headers are checked here.
    dataset = train_dataset(sources, config)                  # dataset[step] is a batch.
    for batch in train_iterator(dataset, config, start_step): ...
    for group in eval_groups(sources.val, config.eval.batch): ...    # Images of any size, padded.

Everything that is wrong with the data is raised as a `DataError` that names the file.
"""

from input_pipeline.check import Report, check
from input_pipeline.errors import DataError
from input_pipeline.evaluation import Group, eval_groups
from input_pipeline.folder import FolderSource
from input_pipeline.images import find_images
from input_pipeline.labels import Labels
from input_pipeline.make_splits import Made, make_splits
from input_pipeline.pack import Packed, pack
from input_pipeline.pipeline import TrainIterator, steps_per_epoch, train_dataset, train_iterator
from input_pipeline.shapes import SHAPES_CLASSES
from input_pipeline.sources import Source, Sources, digest, open_sources

__all__ = [
    "SHAPES_CLASSES",
    "DataError",
    "FolderSource",
    "Group",
    "Labels",
    "Made",
    "Packed",
    "Report",
    "Source",
    "Sources",
    "TrainIterator",
    "check",
    "digest",
    "eval_groups",
    "find_images",
    "make_splits",
    "open_sources",
    "pack",
    "steps_per_epoch",
    "train_dataset",
    "train_iterator",
]
