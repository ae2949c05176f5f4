"""Looks through a whole data set and tells everything that is wrong with it, or worth knowing: `--mode=check`."""

import collections
import hashlib
import statistics
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from input_pipeline import decode, layout
from input_pipeline.decode import Encoded
from input_pipeline.errors import DataError, first_names
from input_pipeline.labels import Labels
from input_pipeline.sources.encoded import EncodedSource, check_sizes
from input_pipeline.sources.folder import FolderSource
from input_pipeline.sources.open import Sources, open_sources

FIX, NOTE = "fix", "note"
_TRAINING = ("labeled", "unlabeled")
_LARGE = 2048  # Median long side, pixels, from which on a crop sees little of an image.


class Mask(NamedTuple):
    """What was found in a mask."""

    name: str
    error: str = ""  # It cannot be read, or differs in size from the image.
    mismatch: bool = False  # The error is the size.
    pixels: np.ndarray | None = None  # int64 [classes], where every value is one of a class or ignored.
    ignored: int = 0  # Pixels.
    uncovered: tuple[str, ...] = ()  # Values of no class.


class Image(NamedTuple):
    """What was found in an image and its masks."""

    name: str
    error: str = ""
    size: tuple[int, int] = (0, 0)  # Height and width.
    gray: bool = False  # All channels are equal.
    digest: bytes = b""  # Of the pixels.
    masks: dict[str, Mask] = {}  # By their names.


class Finding(NamedTuple):
    """Something of one kind that was found."""

    level: str  # FIX: it must be fixed | NOTE.
    kind: str
    title: str
    items: tuple[str, ...]  # Each names its files.
    advice: str  # What to do.


class Report(NamedTuple):
    """The outcome of `check`.

    Attributes:
      images: number of records by part (labeled, unlabeled, val).
      sizes: by part, of the readable images, (height, width) each.
      pixels: by part with labels, int64 [classes]: pixels of each class.
      occurrences: by part with labels, int64 [classes]: images with each class.
      ignored: by part with labels, ignored pixels.
      masks: by part with labels, the number of masks that could be counted.
      classes: names.
      root: folder of the files; "" if there is none.
      findings: those to fix first.
    """

    images: dict[str, int]
    sizes: dict[str, list[tuple[int, int]]]
    pixels: dict[str, np.ndarray]
    occurrences: dict[str, np.ndarray]
    ignored: dict[str, int]
    masks: dict[str, int]
    classes: tuple[str, ...]
    root: str
    findings: tuple[Finding, ...]

    @property
    def defects(self) -> int:
        """The number of things that must be fixed."""
        return sum(len(finding.items) for finding in self.findings if finding.level == FIX)


def check(config) -> Report:
    """Reads every image and mask of a configuration's data once, whatever is wrong with them.

    Raises:
      DataError: there is nothing to read: no root, no lists, no classes.
    """
    data = config.data
    labels = Labels.from_config(data)
    sources, findings = _open(config, labels)
    records = {name: [source.files(index) for index in range(len(source))] for name, source in sources.items()}
    found = _read_all(records, labels, data.threads)
    parts = {name: [found[image.where] for image, _ in pairs] for name, pairs in records.items()}
    masks = {name: _masks_of(pairs, found) for name, pairs in records.items() if sources[name].labels is not None}
    none = np.zeros((1, len(labels.classes)), np.int64)
    counts = {
        name: np.stack([*none, *(mask.pixels for mask in part if mask.pixels is not None)])
        for name, part in masks.items()
    }
    findings += [
        *_damaged(found.values()),
        *_duplicates(parts, data.val_overlap),
        *_repeated(parts),
        *_classes_without(counts, labels.classes),
        *_empty_masks(masks),
        *_unlike(parts),
    ]
    findings = [finding for finding in findings if finding.items]
    return Report(
        images={name: len(pairs) for name, pairs in records.items()},
        sizes={name: [image.size for image in part if not image.error] for name, part in parts.items()},
        pixels={name: each.sum(0) for name, each in counts.items()},
        occurrences={name: (each > 0).sum(0) for name, each in counts.items()},
        ignored={name: sum(mask.ignored for mask in part) for name, part in masks.items()},
        masks={name: len(each) - len(none) for name, each in counts.items()},
        classes=labels.classes,
        root=layout.find_root(data) if data.root else "",
        findings=tuple(sorted(findings, key=lambda finding: finding.level != FIX)),
    )


def _open(config, labels: Labels) -> tuple[dict[str, EncodedSource], list[Finding]]:
    """The sources by part, and what is wrong with the lists or folders."""
    data = config.data
    if data.source == "shapes":
        raise DataError("config.data.source is 'shapes': generated images; there is nothing to check")
    if data.source != "folder":
        return open_sources(config)._asdict(), []
    root = layout.find_root(data)
    found = layout.find_layout(data)
    sources = Sources(
        FolderSource(root, *found.labeled, labels),
        FolderSource(root, *found.unlabeled, None),
        FolderSource(root, *found.val, labels),
    )
    findings = [
        Finding(FIX, "layout", "lists and folders that do not fit", found.defects, "as each line says"),
        Finding(
            NOTE, "unused_masks", "masks of no image", tuple(layout.unused_masks(root, data, found)),
            "the image may be missing, or named differently",
        ),
    ]  # fmt: skip
    if data.val_overlap == "allow":
        overlaps = tuple(layout.overlaps(root, found))
        findings.append(Finding(NOTE, "overlap", "images that are trained on and validate", overlaps, "scores flatter"))
    both = sorted(
        {layout.image_path(root, entry) for entry in found.labeled.entries}
        & {layout.image_path(root, entry) for entry in found.unlabeled.entries}
    )
    if both:
        item = f"{len(both)} of {len(found.labeled.entries)} labeled images"
        advice = "nothing: lists of the literature do so too; their masks are not read there"
        findings.append(Finding(NOTE, "labeled_in_unlabeled", "labeled images among the unlabeled", (item,), advice))
    return sources._asdict(), findings


def _read_all(records: dict[str, list], labels: Labels, threads: int) -> dict[str, Image]:
    """Reads every file once; returns what was found by the names of the images."""
    masks_of: dict[str, dict[str, Encoded]] = collections.defaultdict(dict)
    images = {}
    for image, mask in (pair for pairs in records.values() for pair in pairs):
        images[image.where] = image
        if mask is not None:
            masks_of[image.where][mask.where] = mask

    def read(image: Encoded) -> Image:
        return _read(image, masks_of[image.where].values(), labels)

    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(read, images.values())
        progress = tqdm(results, total=len(images), unit="image", file=sys.stdout, mininterval=1)
        return {result.name: result for result in progress}


def _read(file: Encoded, masks: Iterable[Encoded], labels: Labels) -> Image:
    try:
        pixels = decode.image(file)
    except DataError as error:
        return Image(file.where, str(error), masks={mask.where: _read_mask(mask, None, (), labels) for mask in masks})
    size = pixels.shape[:2]
    return Image(
        file.where,
        size=size,
        gray=bool((pixels[..., :1] == pixels[..., 1:]).all()),
        digest=hashlib.blake2b(pixels.tobytes() + repr(size).encode(), digest_size=16).digest(),
        masks={mask.where: _read_mask(mask, file, size, labels) for mask in masks},
    )


def _read_mask(file: Encoded, image: Encoded | None, size: tuple[int, ...], labels: Labels) -> Mask:
    """Reads a mask; `image` and its size are what it must fit, None if that cannot be read."""
    try:
        raw = labels.raw(file)
    except DataError as error:
        return Mask(file.where, str(error))
    if image is not None:
        try:
            check_sizes(image, size, file, raw.shape)
        except DataError as error:
            return Mask(file.where, str(error), mismatch=True)
    uncovered = labels.uncovered(raw)
    if uncovered:
        return Mask(file.where, uncovered=tuple(map(labels.text, uncovered)))
    counts = np.bincount(labels.to_ids(raw, file.where).ravel(), minlength=256)
    ignored, counts[labels.ignore] = int(counts[labels.ignore]), 0
    return Mask(file.where, pixels=counts[: len(labels.classes)], ignored=ignored)


def _masks_of(pairs: Iterable[tuple[Encoded, Encoded]], found: dict[str, Image]) -> list[Mask]:
    return [found[image.where].masks[mask.where] for image, mask in pairs]


def _damaged(images: Iterable[Image]) -> list[Finding]:
    images = list(images)
    masks = list({mask.name: mask for image in images for mask in image.masks.values()}.values())
    uncovered = collections.defaultdict(list)
    for mask in masks:
        for value in mask.uncovered:
            uncovered[value].append(mask.name)
    values = tuple(f"value {value}: {_count(names, 'mask')}: {_some(names)}" for value, names in uncovered.items())
    return [
        Finding(
            FIX, "unreadable_images", "images that cannot be read", tuple(i.error for i in images if i.error),
            "replace the files or take them out of the lists or folders",
        ),
        Finding(
            FIX, "unreadable_masks", "masks that cannot be read",
            tuple(mask.error for mask in masks if mask.error and not mask.mismatch),
            "export them again, as PNGs of class ids",
        ),
        Finding(
            FIX, "size_mismatches", "masks of another size than their images",
            tuple(mask.error for mask in masks if mask.mismatch),
            "export the mask at the size of the image, or look whether it belongs to another",
        ),
        Finding(
            FIX, "uncovered_values", "values in masks that are no class", values,
            "add the class to the names, map the value to a class or to `ignore` (config.data.label_map), or ignore it "
            "(config.data.ignore_values)",
        ),
    ]  # fmt: skip


def _duplicates(parts: dict[str, list[Image]], overlap: str) -> list[Finding]:
    """Different files with the same pixels."""
    uses = collections.defaultdict(lambda: collections.defaultdict(set))
    for part, images in parts.items():
        for image in images:
            if not image.error:
                uses[image.digest][image.name].add(part)
    groups = [files for files in uses.values() if len(files) > 1]
    leaks, others = [], []
    for files in groups:
        text = " = ".join(f"{name} ({', '.join(sorted(used))})" for name, used in sorted(files.items()))
        used = set().union(*files.values())
        (leaks if "val" in used and used & set(_TRAINING) else others).append(text)
    return [
        Finding(
            FIX if overlap == "refuse" else NOTE, "leaks", "validation images that are copies of training images",
            tuple(leaks), "take one of the copies away: scores on images that were trained on flatter",
        ),
        Finding(NOTE, "duplicates", "copies of images", tuple(others), "a copy counts twice; one can go"),
    ]  # fmt: skip


def _repeated(parts: dict[str, list[Image]]) -> list[Finding]:
    items = []
    for part, images in parts.items():
        counts = collections.Counter(image.name for image in images)
        items += [f"{name}: {count} times ({part})" for name, count in counts.items() if count > 1]
    return [Finding(NOTE, "repeated", "images listed more than once", tuple(items), "a repeated image counts more")]


def _classes_without(counts: dict[str, np.ndarray], classes: Sequence[str]) -> list[Finding]:
    advice = {
        "labeled": "such a class cannot be learned: label an image that has it, or choose a split that holds one "
        "(--mode=split does)",
        "val": "its IoU counts as 0 in the mean: let an image that has it validate",
    }
    return [
        Finding(
            NOTE, f"classes_not_in_{part}", f"classes that no {part} image has",
            tuple(np.array(classes)[~each.any(0)].tolist()), advice[part],
        )
        for part, each in counts.items()
    ]  # fmt: skip


def _empty_masks(masks: dict[str, list[Mask]]) -> list[Finding]:
    names = {m.name: None for part in masks.values() for m in part if m.pixels is not None and not m.pixels.any()}
    return [Finding(NOTE, "empty_masks", "masks without a pixel of a class", tuple(names), "nothing is learned there")]


def _unlike(parts: dict[str, list[Image]]) -> list[Finding]:
    """Unlabeled images that are of another kind than the labeled ones."""
    labeled, unlabeled = ([image for image in parts[part] if not image.error] for part in _TRAINING)
    if not labeled or not unlabeled:
        return []
    sides = [max(image.size) for image in labeled]
    low, high = min(sides) / 2, 2 * max(sides)
    sizes = tuple(
        f"{image.name}: {image.size[1]}x{image.size[0]}" for image in unlabeled if not low <= max(image.size) <= high
    )
    gray = all(image.gray for image in labeled)
    colors = tuple(image.name for image in unlabeled if image.gray != gray)
    mixed = any(image.gray for image in labeled) and not gray
    median = statistics.median_low(sides)
    large = (f"median long side of labeled images {median} pixels",) if median > _LARGE else ()
    return [
        Finding(
            NOTE, "unlike_sizes", "unlabeled images of less than half or more than twice the labeled ones' size", sizes,
            "classes look different at another scale: scale them, or leave them out",
        ),
        Finding(
            NOTE, "unlike_colors", f"unlabeled images in {'color' if gray else 'gray'}, which no labeled one is",
            () if mixed else colors, "do they come from where the labeled ones do?",
        ),
        Finding(
            NOTE, "large", "large images", large,
            "a training crop of 513 pixels sees little of them, and whole images need much memory in evaluation: scale "
            "them down, or take config.eval.mode=sliding_window",
        ),
    ]  # fmt: skip


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) != 1 else ''}"


def _some(names: Sequence[str]) -> str:
    return first_names(sorted(names), 5)
