"""Makes split lists: nested subsets of the labeled images, the rest as unlabeled ones, and validation images.

The labeled images are put into one order, and each subset is the first so many of it: every smaller subset is contained
in every larger one, also in those that are made later. The order depends on the names, the seed and, where it is
stratified, the classes in the masks; it is the same on every machine.

Libraries stratify into folds of given sizes (scikit-learn's stratifiers, iterative-stratification); an order of which
every beginning is stratified they do not make.
"""

import os
import re
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from input_pipeline import layout, split_lists
from input_pipeline.decode import Encoded
from input_pipeline.errors import DataError, first_lines
from input_pipeline.labels import Labels
from input_pipeline.layout import Layout
from input_pipeline.split_lists import LABELED, UNLABELED, VAL, Entry

FULL = "full"  # The subset of all labeled images.
_CANDIDATES = 256  # Images compared for one place; more would make large data sets slow.


class Made(NamedTuple):
    """What was made of a subset."""

    name: str
    labeled: int
    unlabeled: int
    val: int
    absent: tuple[str, ...]  # Classes of the labeled images that no image of the subset has; () if not stratified.


def make_splits(data, subsets: Sequence[str], seed: int = 0, stratify: bool = True, target: str = "") -> list[Made]:
    """Writes TARGET/NAME/{labeled,unlabeled}.txt for each subset, and TARGET/val.txt.

    Args:
      data: `config.data`, which says where the images are.
      subsets: names: fractions of the labeled images that do not validate ("1_8" or "1/8"), numbers ("30"), or "full".
      seed: of the choice.
      stratify: whether rare classes come into the small subsets; reads all masks.
      target: folder, absolute or under `data.root`; default `data.splits`.

    Raises:
      DataError: the data or the subsets cannot be used, or a list is there already. Nothing was written then.
    """
    root = layout.find_root(data)
    target = os.path.join(root, target or data.splits)
    found = layout.find_layout(data)
    if found.defects:
        raise DataError(first_lines(found.defects))
    pool, unlabeled, val = _pools(root, found)
    fraction = None if data.split else layout.held_out_fraction(data.folders)
    present = {}
    if stratify:
        labels = Labels.from_config(data)
        present = classes_present(root, pool + val, labels)
        if fraction is not None:
            pool, val = hold_out(sorted(pool + val), present, fraction)
    sizes = {_folder_name(subset): _size(subset, len(pool)) for subset in subsets}
    order = stratified(pool, present, str(seed)) if stratify else layout.shuffled(pool, str(seed))

    lists, made = {VAL: val}, []
    for name, size in sizes.items():
        chosen = set(order[:size])
        few = [entry for entry in pool if entry in chosen]
        rest = [entry for entry in pool if entry not in chosen] + unlabeled
        lists |= {os.path.join(name, LABELED): few, os.path.join(name, UNLABELED): rest or few}
        absent = _absent(present, few, pool, data.classes) if stratify else ()
        made.append(Made(name, size, len(rest or few), len(val), absent))
    _write(target, lists)
    return made


def classes_present(root: str, entries: Sequence[Entry], labels: Labels) -> dict[Entry, np.ndarray]:
    """Reads masks: which classes each has, bool [classes]; raises DataError for the first that cannot be used."""

    def read(entry: Entry) -> np.ndarray:
        path = os.path.join(root, entry.mask)
        counts = np.bincount(labels.decode(Encoded(path, path)).ravel(), minlength=256)
        counts[labels.ignore] = 0
        return counts[: len(labels.classes)] > 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = tqdm(pool.map(read, entries), total=len(entries), unit="mask", file=sys.stdout, mininterval=1)
        return dict(zip(entries, results, strict=True))


def stratified(entries: Sequence[Entry], present: dict[Entry, np.ndarray], salt: str) -> list[Entry]:
    """Orders entries so that every beginning of the order has its share of each class, rare ones first.

    As in iterative stratification (Sechidis et al., 2011) each place goes to the class that lags most, by the part of
    its images that were taken so far, the rarest of equals; of its images that one is taken whose other classes lag
    most, too.
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
        queue = np.flatnonzero(left)  # Of images without any class, at the end.
        if np.isfinite(share).any():
            last = np.lexsort((total, share))[0]
            queue = queues[last] = queues[last][left[queues[last]]]
        candidates = queue[:_CANDIDATES]
        # Whole numbers: a sum of fractions would depend on its order, which differs between machines.
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
    """Divides entries in those to train on and those that validate; stratified, whatever the seed of the subsets.

    A class of one image stays in training: what cannot be learned need not be tested.
    """
    order = stratified(entries, present, "training")
    kept, missing = 0, np.any([present[entry] for entry in entries], axis=0)
    while missing.any():
        missing &= ~present[order[kept]]
        kept += 1
    count = layout.held_out_count(fraction, len(entries))
    val = set(stratified(order[kept:], present, "validation")[:count])
    return [entry for entry in entries if entry not in val], sorted(val)


def _pools(root: str, found: Layout) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """Labeled, further unlabeled and validation entries."""
    labeled = {layout.image_path(root, entry) for entry in found.labeled.entries}
    unlabeled = [entry for entry in found.unlabeled.entries if layout.image_path(root, entry) not in labeled]
    return list(dict.fromkeys(found.labeled.entries)), unlabeled, found.val.entries


def _folder_name(subset: str) -> str:
    return subset.replace("/", "_")


def _size(subset: str, images: int) -> int:
    """How many labeled images a subset has; raises DataError."""
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
        raise DataError(f"subset {subset!r}: {size} images; there are {images} labeled ones that do not validate")
    return size


def _absent(present: dict[Entry, np.ndarray], few: list[Entry], pool: list[Entry], classes) -> tuple[str, ...]:
    """Classes that some image of `pool` has and none of `few`."""
    lost = np.any([present[entry] for entry in pool], axis=0) & ~np.any([present[entry] for entry in few], axis=0)
    return tuple(np.array(classes)[lost].tolist())


def _write(target: str, lists: dict[str, list[Entry]]) -> None:
    """Writes lists, by their paths below `target`: all or, if one is there already with other content, none."""
    texts = {name: split_lists.format_list(entries) for name, entries in lists.items()}
    there = [os.path.join(target, name) for name in texts if os.path.lexists(os.path.join(target, name))]
    others = [path for path in there if not _holds(path, texts[os.path.relpath(path, target)])]
    if others:
        raise DataError(
            f"{', '.join(others)}: there already, with other images; nothing was written. Take another folder (--to), "
            "or move the old lists away"
        )
    part = f"{target.rstrip(os.sep)}.part"
    shutil.rmtree(part, ignore_errors=True)
    for name, text in texts.items():
        os.makedirs(os.path.dirname(os.path.join(part, name)), exist_ok=True)
        with open(os.path.join(part, name), "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
    for name in texts:
        os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
        os.replace(os.path.join(part, name), os.path.join(target, name))
    shutil.rmtree(part)


def _holds(path: str, text: str) -> bool:
    with open(path, "rb") as file:
        return file.read() == text.encode()
