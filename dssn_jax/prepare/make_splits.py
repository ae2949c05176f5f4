"""Makes split lists: nested subsets of the labeled images, the other images as unlabeled, and validation images.

The labeled images are put into one order, and a subset is a prefix of it, so that each subset is contained in every
larger one, also in those that are made later. The order depends on the names, the seed and, if stratified, the classes
in the masks; it is the same on every machine.

Stratifiers of libraries (scikit-learn, iterative-stratification) make folds of given sizes; none makes an order whose
prefixes are all stratified.
"""

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from input_pipeline import layout, split_lists
from input_pipeline.decode import Encoded
from input_pipeline.errors import DataError, first_messages
from input_pipeline.labels import Labels
from input_pipeline.layout import Layout
from input_pipeline.split_lists import LABELED, UNLABELED, VAL, Entry

FULL = "full"  # The subset of all labeled images.
_CANDIDATES = 256  # Images compared for one place; more would make large data sets slow.


class SplitSummary(NamedTuple):
    """The numbers of images in the lists of a subset."""

    name: str
    labeled: int
    unlabeled: int
    val: int
    absent: tuple[str, ...]  # Classes that labeled images have, but none of the subset; () if not stratified.


def make_splits(
    data, subsets: Sequence[str], *, seed: int = 0, stratify: bool = True, to: str = ""
) -> list[SplitSummary]:
    """Writes TO/NAME/{labeled,unlabeled}.txt for each subset, and TO/val.txt.

    Args:
      data: `config.data`, which names the images.
      subsets: fractions of the labeled images that are not for validation ("1_8" or "1/8"), counts ("30"), or "full".
      seed: selects the images.
      stratify: whether small subsets get rare classes too; reads all masks.
      to: folder, absolute or under `data.root`; default `data.splits`.

    Raises:
      DataError: the data or the subsets cannot be used, or a list exists already. Nothing was written then.
    """
    root = layout.find_root(data)
    files = layout.find_layout(data)
    if files.defects:
        raise DataError(first_messages(files.defects))
    pool, unlabeled, val = _pools(root, files)
    fraction = None if data.split else layout.held_out_fraction(data.folders)
    present = {}
    if stratify:
        present = classes_present(root, pool + val, Labels.from_config(data))
        if fraction is not None:
            pool, val = hold_out(sorted(pool + val), present, fraction)
    sizes = {_folder_name(subset): _size(subset, len(pool)) for subset in subsets}
    order = stratified(pool, present, str(seed)) if stratify else layout.shuffled(pool, str(seed))

    lists, summaries = {VAL: val}, []
    for name, size in sizes.items():
        chosen = set(order[:size])
        labeled = [entry for entry in pool if entry in chosen]
        rest = [entry for entry in pool if entry not in chosen] + unlabeled or labeled
        lists |= {os.path.join(name, LABELED): labeled, os.path.join(name, UNLABELED): rest}
        absent = _absent(present, labeled, pool, data.classes) if stratify else ()
        summaries.append(SplitSummary(name, size, len(rest), len(val), absent))
    _write(os.path.join(root, to or data.splits), lists)
    return summaries


def classes_present(root: str, entries: Sequence[Entry], labels: Labels) -> dict[Entry, np.ndarray]:
    """Returns which classes each mask has, bool [classes]; raises DataError for the first unusable mask."""

    def read(entry: Entry) -> np.ndarray:
        path = os.path.join(root, entry.mask)
        counts = np.bincount(labels.decode(Encoded(path, path)).ravel(), minlength=256)
        counts[labels.ignore] = 0
        return counts[: len(labels.classes)] > 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = tqdm(pool.map(read, entries), total=len(entries), unit="mask", file=sys.stdout, mininterval=1)
        return dict(zip(entries, results, strict=True))


def stratified(entries: Sequence[Entry], present: dict[Entry, np.ndarray], salt: str) -> list[Entry]:
    """Orders entries so that every prefix of the order has its share of each class, rare classes first.

    As in iterative stratification (Sechidis et al., 2011), the next place goes to the class of whose images the
    smallest share was taken so far, ties to the rarest class; among its images, the one whose other classes lag most
    is taken.
    """
    if not entries:
        return []
    waiting = layout.shuffled(entries, salt)
    has = np.array([present[entry] for entry in waiting])
    total, taken = has.sum(0), np.zeros(has.shape[1], int)
    left, order = np.ones(len(waiting), bool), []
    queues = [np.flatnonzero(column) for column in has.T]
    for _ in waiting:
        share = np.where(taken < total, taken / np.maximum(total, 1), np.inf)
        queue = np.flatnonzero(left)  # If no class is left: images without any class.
        if np.isfinite(share).any():
            last = np.lexsort((total, share))[0]
            queue = queues[last] = queues[last][left[queues[last]]]
        candidates = queue[:_CANDIDATES]
        # Integers: a floating-point sum depends on the order of its terms, which differs between machines.
        behind = np.where(np.isfinite(share), (len(order) + 1) / len(waiting) - share, 0)
        need = np.int64(behind / np.maximum(total, 1) * 2**40)
        best = candidates[np.argmax(has[candidates] @ need)]
        left[best] = False
        taken += has[best]
        order.append(waiting[best])
    return order


def hold_out(
    entries: Sequence[Entry], present: dict[Entry, np.ndarray], fraction: float
) -> tuple[list[Entry], list[Entry]]:
    """Divides entries into training and validation entries, stratified; independent of the seed of the subsets.

    The only image of a class stays in training: a class that cannot be learned need not be tested.
    """
    order = stratified(entries, present, "training")
    kept, missing = 0, np.any([present[entry] for entry in entries], axis=0)
    while missing.any():
        missing &= ~present[order[kept]]
        kept += 1
    count = layout.held_out_count(fraction, len(entries))
    val = set(stratified(order[kept:], present, "validation")[:count])
    return [entry for entry in entries if entry not in val], sorted(val)


def _pools(root: str, files: Layout) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """Returns the labeled, the other unlabeled and the validation entries."""
    labeled = {layout.image_path(root, entry) for entry in files.labeled.entries}
    unlabeled = [entry for entry in files.unlabeled.entries if layout.image_path(root, entry) not in labeled]
    return list(dict.fromkeys(files.labeled.entries)), unlabeled, files.val.entries


def _folder_name(subset: str) -> str:
    return subset.replace("/", "_")


def _size(subset: str, images: int) -> int:
    """Returns the number of labeled images of a subset; raises DataError."""
    fraction = re.fullmatch(r"([1-9]\d*)[_/]([1-9]\d*)", subset)
    if fraction:
        size = max(1, round(images * int(fraction[1]) / int(fraction[2])))
    elif re.fullmatch(r"[1-9]\d*", subset):
        size = int(subset)
    elif subset == FULL:
        size = images
    else:
        raise DataError(f"subset {subset!r}: expected a fraction such as 1_8, a number of images, or {FULL}")
    if size > images:
        raise DataError(
            f"subset {subset!r}: {size} images; there are {images} labeled images that are not for validation"
        )
    return size


def _absent(present: dict[Entry, np.ndarray], labeled: list[Entry], pool: list[Entry], classes) -> tuple[str, ...]:
    """Returns the classes that some image of `pool` has, but none of `labeled`."""
    in_pool, in_labeled = (np.any([present[entry] for entry in entries], axis=0) for entries in (pool, labeled))
    return tuple(np.array(classes)[in_pool & ~in_labeled].tolist())


def _write(folder: str, lists: dict[str, list[Entry]]) -> None:
    """Writes lists by their paths below `folder`: all or, if one exists already with other content, none."""
    texts = {name: split_lists.format_list(entries) for name, entries in lists.items()}
    paths = {name: os.path.join(folder, name) for name in texts}
    others = [path for name, path in paths.items() if os.path.lexists(path) and not _holds(path, texts[name])]
    if others:
        raise DataError(
            f"{', '.join(others)}: exists already, with other images; nothing was written. Choose another folder "
            "(--to), or move the old lists away"
        )
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=folder) as part:
        for number, text in enumerate(texts.values()):
            with open(os.path.join(part, str(number)), "wb") as file:
                file.write(text.encode(errors="surrogateescape"))
        for number, path in enumerate(paths.values()):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.replace(os.path.join(part, str(number)), path)


def _holds(path: str, text: str) -> bool:
    with open(path, "rb") as file:
        return file.read() == text.encode(errors="surrogateescape")
