"""Checks a whole data set and reports every problem at once: `--mode=check`."""

import collections
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from configs.checks import ConfigError
from dssn_jax import models
from dssn_jax.prepare.inspect_files import ImageInfo, MaskInfo, inspect_files
from dssn_jax.validate import validate_crops
from input_pipeline import layout
from input_pipeline.errors import DataError, first_names
from input_pipeline.labels import Labels
from input_pipeline.sources.encoded import EncodedSource
from input_pipeline.sources.folder import FolderSource
from input_pipeline.sources.open import Sources, open_sources

FIX, NOTE = "fix", "note"
_LARGE = 2048  # Median long side, pixels, above which a crop covers little of an image.


class Kind(NamedTuple):
    """A kind of problem."""

    level: str  # FIX: must be fixed | NOTE.
    title: str
    advice: str


# In the order of the report.
KINDS = {
    "layout": Kind(FIX, "lists and folders that do not fit", "as each line says"),
    "crops": Kind(FIX, "crops that the encoder cannot take", "set the key to one of the sides that the line names"),
    "unreadable_images": Kind(
        FIX, "images that cannot be read", "replace the files or remove them from the lists or folders"
    ),
    "unreadable_masks": Kind(FIX, "masks that cannot be read", "export them again, as PNGs of class ids"),
    "size_mismatches": Kind(
        FIX, "masks whose size differs from their image's",
        "export the mask at the size of the image, or check that it belongs to this image",
    ),
    "uncovered_values": Kind(
        FIX, "mask values without a class",
        "add the class to the names, map the value to a class or to `ignore` (config.data.label_map), or ignore it "
        "(config.data.ignore_values)",
    ),
    "leaks": Kind(
        FIX, "validation images that are copies of training images",
        "remove one of the copies: training on validation images inflates scores",
    ),
    "allowed_leaks": Kind(
        NOTE, "validation images that are copies of training images", "scores are inflated (config.data.val_overlap)"
    ),
    "overlap": Kind(NOTE, "images for both training and validation", "scores are inflated (config.data.val_overlap)"),
    "unused_masks": Kind(NOTE, "masks without an image", "the image may be missing, or have another name"),
    "labeled_in_unlabeled": Kind(
        NOTE, "labeled images among the unlabeled ones",
        "nothing to do: published splits do so too; their masks are not read there",
    ),
    "duplicates": Kind(NOTE, "copies of images", "a copy counts twice; one can be removed"),
    "repeated": Kind(NOTE, "images listed more than once", "a repeated image counts more"),
    "classes_not_in_labeled": Kind(
        NOTE, "classes that no labeled image has",
        "such a class cannot be learned: label an image of it, or choose a split that has one (--mode=split does)",
    ),
    "classes_not_in_val": Kind(
        NOTE, "classes that no validation image has",
        "its IoU counts as 0 in the mean: add an image of it to the validation images",
    ),
    "empty_masks": Kind(NOTE, "masks without a pixel of any class", "they teach nothing"),
    "unlike_sizes": Kind(
        NOTE, "unlabeled images of less than half or more than twice the size of the labeled ones",
        "objects appear at another scale: resize these images, or leave them out",
    ),
    "unlike_colors": Kind(
        NOTE, "unlabeled images in gray where labeled ones are in color, or the reverse",
        "check that they come from the same source as the labeled ones",
    ),
    "large": Kind(
        NOTE, "large images",
        "a training crop of 513 pixels covers little of them, and evaluating them whole needs much memory: resize "
        "them, or set config.eval.mode=sliding_window",
    ),
}  # fmt: skip


class Finding(NamedTuple):
    """All problems of one kind."""

    kind: str  # A key of `KINDS`.
    items: tuple[str, ...]  # Each names its files.

    @property
    def must_fix(self) -> bool:
        return KINDS[self.kind].level == FIX


class SplitStatistics(NamedTuple):
    """Statistics of the images of a split; the last four are of its usable masks, None for a split without labels."""

    images: int
    sizes: list[tuple[int, int]]  # (height, width) of each readable image.
    masks: int | None = None
    pixels: np.ndarray | None = None  # int64 [classes], pixels of each class.
    occurrences: np.ndarray | None = None  # int64 [classes], images with each class.
    ignored: int | None = None  # Pixels.


class Report(NamedTuple):
    """The outcome of `check_data`."""

    splits: dict[str, SplitStatistics]  # labeled, unlabeled, val
    classes: tuple[str, ...]
    root: str  # Folder of the files; "" if the data are no files.
    findings: tuple[Finding, ...]  # Errors first.

    @property
    def labeled_splits(self) -> dict[str, SplitStatistics]:
        """The splits that have labels."""
        return {name: split for name, split in self.splits.items() if split.pixels is not None}

    @property
    def defects(self) -> int:
        """The number of problems that must be fixed."""
        return sum(len(finding.items) for finding in self.findings if finding.must_fix)


def check_data(config) -> Report:
    """Decodes every image and mask of a configuration's data once and collects all problems.

    Raises:
      DataError: there is nothing to check: no root, no lists, no classes.
      ConfigError: there is no such network.
    """
    data = config.data
    crops = _crops(config)
    labels = Labels.from_config(data)
    sources, findings = _open(config, labels)
    pairs = {name: [source.files(index) for index in range(len(source))] for name, source in sources.items()}
    infos = inspect_files((pair for split in pairs.values() for pair in split), labels, data.threads)
    images = {name: [infos[image.where] for image, _ in split] for name, split in pairs.items()}
    masks = {
        name: [infos[image.where].masks[mask.where] for image, mask in split]
        for name, split in pairs.items()
        if sources[name].labels is not None
    }
    splits = {name: _statistics(images[name], masks.get(name), len(labels.classes)) for name in pairs}
    findings["crops"] = crops
    findings |= _unusable(infos.values()) | _copies(images, data.val_overlap)
    findings |= {
        "repeated": _repeated(images),
        "empty_masks": _empty(mask for split in masks.values() for mask in split),
    }
    for name in masks:
        findings[f"classes_not_in_{name}"] = np.array(labels.classes)[splits[name].occurrences == 0].tolist()
    findings |= _unlike([i for i in images["labeled"] if not i.error], [i for i in images["unlabeled"] if not i.error])
    ordered = [Finding(kind, tuple(findings[kind])) for kind in KINDS if findings.get(kind)]
    return Report(splits, labels.classes, layout.find_root(data) if data.root else "", tuple(ordered))


def _crops(config) -> list[str]:
    """Returns why the encoder cannot take the training crop or the sliding windows; nothing where it can."""
    models.check(config.model)
    try:
        validate_crops(config)
    except ConfigError as error:
        return [str(error)]
    return []


def _open(config, labels: Labels) -> tuple[dict[str, EncodedSource], dict[str, list[str]]]:
    """Returns the sources by split, and findings about the lists or folders."""
    data = config.data
    if data.source == "shapes":
        raise DataError("config.data.source is 'shapes': the images are generated, so there is nothing to check")
    if data.source != "folder":
        return open_sources(config)._asdict(), {}
    root, files = layout.find_root(data), layout.find_layout(data)
    sources = Sources(
        FolderSource(root, *files.labeled, labels),
        FolderSource(root, *files.unlabeled, None),
        FolderSource(root, *files.val, labels),
    )
    findings = {"layout": files.defects, "unused_masks": layout.unused_masks(root, data, files)}
    if data.val_overlap == "allow":
        findings["overlap"] = layout.overlaps(root, files)
    labeled, unlabeled = (
        {layout.image_path(root, entry) for entry in split.entries} for split in (files.labeled, files.unlabeled)
    )
    if labeled & unlabeled:
        findings["labeled_in_unlabeled"] = [f"{len(labeled & unlabeled)} of {len(labeled)} labeled images"]
    return sources._asdict(), findings


def _statistics(images: list[ImageInfo], masks: list[MaskInfo] | None, classes: int) -> SplitStatistics:
    split = SplitStatistics(len(images), [image.size for image in images if not image.error])
    if masks is None:
        return split
    usable = [mask for mask in masks if not mask.defect]
    counts = np.array([mask.pixels for mask in usable], np.int64).reshape(-1, classes)
    return split._replace(
        masks=len(usable),
        pixels=counts.sum(0),
        occurrences=(counts > 0).sum(0),
        ignored=sum(mask.ignored for mask in usable),
    )


def _unusable(images: Iterable[ImageInfo]) -> dict[str, list[str]]:
    """Returns the errors of images and masks, and the mask values without a class with the masks that have them."""
    findings, masks_with = collections.defaultdict(list), collections.defaultdict(list)
    masks = {}
    for image in images:
        masks |= image.masks
        if image.error:
            findings["unreadable_images"].append(image.error)
    for mask in masks.values():
        if mask.defect == "uncovered_values":
            for value in mask.details:
                masks_with[value].append(mask.name)
        elif mask.defect:
            findings[mask.defect] += mask.details
    for value, names in masks_with.items():
        count = f"{len(names)} mask{'s' if len(names) != 1 else ''}"
        findings["uncovered_values"].append(f"value {value}: {count}: {first_names(sorted(names), 5)}")
    return findings


def _copies(images: dict[str, list[ImageInfo]], overlap: str) -> dict[str, list[str]]:
    """Returns groups of files with equal pixels, those across training and validation apart."""
    splits_of = collections.defaultdict(lambda: collections.defaultdict(set))  # Digest -> name -> splits.
    for split, infos in images.items():
        for image in infos:
            if not image.error:
                splits_of[image.digest][image.name].add(split)
    leaks, others = [], []
    for files in splits_of.values():
        if len(files) > 1:
            text = " = ".join(f"{name} ({', '.join(sorted(splits))})" for name, splits in sorted(files.items()))
            splits = set().union(*files.values())
            (leaks if "val" in splits and len(splits) > 1 else others).append(text)
    return {"leaks" if overlap == "refuse" else "allowed_leaks": leaks, "duplicates": others}


def _repeated(images: dict[str, list[ImageInfo]]) -> list[str]:
    counts = {split: collections.Counter(image.name for image in infos) for split, infos in images.items()}
    return [
        f"{name}: {count} times ({split})"
        for split, counter in counts.items()
        for name, count in counter.items()
        if count > 1
    ]


def _empty(masks: Iterable[MaskInfo]) -> list[str]:
    """Returns the names of usable masks in which every pixel is ignored."""
    return list(dict.fromkeys(mask.name for mask in masks if not mask.defect and not mask.pixels.any()))


def _unlike(labeled: Sequence[ImageInfo], unlabeled: Sequence[ImageInfo]) -> dict[str, list[str]]:
    """Compares the sizes and colors of readable unlabeled images with those of the labeled ones."""
    if not labeled or not unlabeled:
        return {}
    sides = [max(image.size) for image in labeled]
    smallest, largest, median = min(sides) / 2, 2 * max(sides), statistics.median_low(sides)
    grays = {image.gray for image in labeled}
    return {
        "unlike_sizes": [
            f"{image.name}: {image.size[1]}x{image.size[0]}"
            for image in unlabeled
            if not smallest <= max(image.size) <= largest
        ],
        "unlike_colors": [image.name for image in unlabeled if image.gray not in grays],
        "large": [f"median long side of the labeled images: {median} pixels"] if median > _LARGE else [],
    }
