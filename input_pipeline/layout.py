"""Which images are labeled, unlabeled and for validation: named by split lists, or by folders of images and masks."""

import collections
import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from input_pipeline import split_lists
from input_pipeline.errors import DataError, first_names, printable
from input_pipeline.split_lists import LIST_SUFFIX, Entry

# Formats of photos and scans that Pillow reads: BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF, WebP.
IMAGE_SUFFIXES = (
    ".apng", ".bmp", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx",
    ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_REPORTED = 5  # Files named per message.


class SplitEntries(NamedTuple):
    """The images of a split: labeled, unlabeled or validation."""

    entries: list[Entry]
    where: str  # The list or folder that names them, for messages.


class Layout(NamedTuple):
    """The images that a `config.data` names; none was opened.

    Attributes:
      labeled: entries with masks.
      unlabeled: entries whose masks, if any, are not read. The labeled ones if nothing else is named.
      val: entries with masks.
      defects: error messages, each naming its files.
    """

    labeled: SplitEntries = SplitEntries([], "")
    unlabeled: SplitEntries = SplitEntries([], "")
    val: SplitEntries = SplitEntries([], "")
    defects: tuple[str, ...] = ()


SPLITS = ("labeled", "unlabeled", "val")


def find_layout(data, splits: Sequence[str] = SPLITS) -> Layout:
    """Finds the images of a `config.data`: those of the lists of `data.split`, or else of `data.folders`.

    Args:
      data: `config.data`.
      splits: names of the splits to find. Lists and folders that these do not need are neither read nor required, and
        the other splits of the result may be empty.

    Raises:
      DataError: no such root, split, folder or list, so that there is nothing to look at. All other problems are in
        the `defects` of the result.
    """
    root = find_root(data)
    if data.split or not data.folders.labeled:
        layout = _from_lists(split_lists.find_split(root, data.splits, data.split, splits), splits)
    elif tuple(splits) == ("val",):
        layout = _val_from_folders(root, data.folders)
    else:
        layout = _from_folders(root, data)
    if not layout.defects:
        empty = [(name, getattr(layout, name)) for name in splits if not getattr(layout, name).entries]
        layout = layout._replace(defects=tuple(f"{split.where}: no {name} images" for name, split in empty))
    if data.val_overlap == "refuse":
        layout = layout._replace(defects=(*layout.defects, *overlaps(root, layout)))
    return layout


def find_root(data) -> str:
    """Returns the absolute path of `data.root`; raises DataError if it is not a folder."""
    if not data.root:
        raise DataError("config.data.root is not set: the folder that the paths in the lists are relative to")
    root = os.path.abspath(os.path.expanduser(data.root))
    if not os.path.isdir(root):
        raise DataError(f"the data root {root!r} is not a folder (config.data.root)")
    return root


def images_below(folder: str) -> list[str]:
    """Returns the paths of the images in a folder and its sub-folders, relative to it and sorted.

    Links are followed, but not into a folder that they are in, where they would lead in circles.

    Raises:
      DataError: a folder that cannot be read.
    """
    names, inside = [], {folder: {_identity(folder)}}  # Maps a folder to the identities of it and its parents.
    for where, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        above = inside.pop(where)
        for name in list(folders):
            path = os.path.join(where, name)
            if (own := _identity(path)) in above:
                folders.remove(name)
            else:
                inside[path] = above | {own}
        names += [os.path.relpath(os.path.join(where, file), folder) for file in files]
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: this folder cannot be read: {error.strerror}")


def image_path(root: str, entry: Entry) -> str:
    """Returns the real path of the image, equal for all spellings of it in lists and for links to it."""
    return os.path.realpath(os.path.join(root, entry.image))


def shuffled(entries: Iterable[Entry], salt: str) -> list[Entry]:
    """Returns entries in a pseudo-random order that depends on their names and `salt` alone.

    The order is that of digests, not of a random generator, so it is the same on every machine and with every version
    of NumPy, and adding images hardly changes it.
    """

    def key(entry: Entry):
        return hashlib.sha256(os.fsencode(f"{salt}\n{entry.image}")).digest(), entry.image

    return sorted(entries, key=key)


def held_out_fraction(folders) -> float | None:
    """Returns the fraction of the labeled images that `data.folders.val` holds out; None if it is a folder or a list.

    Raises:
      DataError: a number that is no fraction.
    """
    try:
        fraction = float(folders.val)
    except ValueError:
        return None
    if not 0 < fraction < 1:
        raise DataError(
            f"config.data.folders.val is {folders.val}; expected a fraction between 0 and 1, a folder or a list"
        )
    return fraction


def held_out_count(fraction: float, images: int) -> int:
    """Returns the number of held-out images: at least one, but not all."""
    return max(0, min(max(1, round(fraction * images)), images - 1))


def _from_lists(lists: split_lists.SplitLists, splits: Sequence[str]) -> Layout:
    named, defects = {}, []
    for name in splits:
        path = getattr(lists, name)
        entries, wrong = split_lists.parse_list(path, labeled=name != "unlabeled")
        named[name] = SplitEntries(entries, path)
        defects += wrong
    return Layout(**named, defects=tuple(defects))


def _from_folders(root: str, data) -> Layout:
    folders, defects = data.folders, []
    labeled, unmasked = _with_masks(root, folders, "labeled", folders.masks, defects)
    unlabeled = _entries(root, folders, "unlabeled", defects) if folders.unlabeled else []
    val = _validation(root, folders, labeled, defects)

    def without_val(entries: list[Entry], where: str) -> list[Entry]:
        # A held-out fraction is excluded. A folder of validation images is excluded from the other folders, but not
        # from lists, which mean every image that they name; `overlaps` checks these.
        named = held_out_fraction(folders) is None
        if named and (data.val_overlap == "allow" or where.endswith(LIST_SUFFIX)):
            return entries
        return _subtract(root, entries, val.entries)

    labeled, unmasked = (without_val(entries, folders.labeled) for entries in (labeled, unmasked))
    unlabeled = without_val(unlabeled, folders.unlabeled)
    unmasked = _subtract(root, unmasked, unlabeled)
    if folders.unmasked == "unlabeled":
        unlabeled = [*unmasked, *unlabeled]
    else:
        advice = "; to use them as unlabeled images set config.data.folders.unmasked=unlabeled"
        defects += _missing_masks(unmasked, f"images in {folders.labeled}", advice)
    return Layout(
        SplitEntries(labeled, os.path.join(root, folders.labeled)),
        SplitEntries(unlabeled or labeled, os.path.join(root, folders.unlabeled or folders.labeled)),
        val,
        tuple(defects),
    )


def _val_from_folders(root: str, folders) -> Layout:
    """Finds the validation images alone, which needs the labeled ones only if they are a fraction of those."""
    labeled, defects = [], []
    if held_out_fraction(folders) is not None:
        labeled, _ = _with_masks(root, folders, "labeled", folders.masks, defects)
    return Layout(val=_validation(root, folders, labeled, defects), defects=tuple(defects))


def _validation(root: str, folders, labeled: list[Entry], defects: list[str]) -> SplitEntries:
    """Returns the images of `folders.val`, or a fraction of the labeled ones; appends to `defects`."""
    fraction = held_out_fraction(folders)
    if fraction is None:
        val, unmasked = _with_masks(root, folders, "val", folders.val_masks or folders.masks, defects)
        defects += _missing_masks(unmasked, "validation images")
        return SplitEntries(val, os.path.join(root, folders.val))
    val = sorted(shuffled(labeled, "validation")[: held_out_count(fraction, len(labeled))])
    if not val:
        defects.append(f"no validation image: {fraction} of {len(labeled)} labeled images (config.data.folders.val)")
    return SplitEntries(val, os.path.join(root, folders.labeled))


def _entries(root: str, folders, key: str, defects: list[str]) -> list[Entry]:
    """Returns the images of the folder `folders[key]`, without masks, or the entries of a list."""
    where, what = folders[key], f"config.data.folders.{key}"
    path = os.path.join(root, where)
    if os.path.isdir(path):
        entries = [Entry(os.path.join(where, name), None) for name in images_below(path)]
        if not entries:
            defects.append(f"{path}: no image in this folder ({what})")
        return entries
    if not os.path.isfile(path) or not path.endswith(LIST_SUFFIX):
        raise DataError(f"{path}: no such folder, nor a list ({LIST_SUFFIX}) ({what})")
    entries, wrong = split_lists.parse_list(path, labeled=key != "unlabeled")
    defects += wrong
    return entries


def _with_masks(root: str, folders, key: str, masks: str, defects: list[str]) -> tuple[list[Entry], list[Entry]]:
    """Returns the entries of a folder or a list that have a mask, and those of a folder that have none."""
    images = _entries(root, folders, key, defects)
    if folders[key].endswith(LIST_SUFFIX):
        return images, []
    image_folder, mask_folder = (os.path.join(root, name) for name in (folders[key], masks))
    if not os.path.isdir(mask_folder):
        raise DataError(f"{mask_folder}: no such folder (config.data.folders.masks)")
    by_stem = collections.defaultdict(list)
    for name in images_below(mask_folder):
        by_stem[os.path.splitext(name)[0]].append(os.path.join(masks, name))
    pairs, unmasked, image_of = [], [], {}
    for image, _ in images:
        if _is_mask(os.path.join(root, image), image_folder, mask_folder, folders.mask_suffix):
            continue
        stem = os.path.splitext(os.path.relpath(image, folders[key]))[0] + folders.mask_suffix
        candidates = by_stem.get(stem, [])
        if len(candidates) > 1:
            names = first_names(candidates, _REPORTED)
            defects.append(f"{printable(os.path.join(root, image))}: several masks, {names}; expected one")
        elif not candidates:
            unmasked.append(Entry(image, None))
        elif (mask := candidates[0]) in image_of:
            two = first_names((image_of[mask], image))
            defects.append(f"{printable(os.path.join(root, mask))}: mask of two images, {two}")
        else:
            image_of[mask] = image
            pairs.append(Entry(image, mask))
    return pairs, unmasked


def _is_mask(path: str, images: str, masks: str, suffix: str) -> bool:
    """Whether a file below the folder `images` is a mask, since masks may be next to images or in a sub-folder."""
    if os.path.normpath(images) == os.path.normpath(masks):
        return bool(suffix) and os.path.splitext(path)[0].endswith(suffix)
    return not os.path.relpath(path, masks).startswith(os.pardir)


def _missing_masks(entries: Sequence[Entry], what: str, advice: str = "") -> list[str]:
    """Returns the message that entries have no mask, if there are any."""
    names = first_names([entry.image for entry in entries], _REPORTED)
    return [f"{len(entries)} {what} have no mask: {names}{advice}"] if entries else []


def overlaps(root: str, layout: Layout) -> list[str]:
    """Returns messages that name the validation images that are also trained on."""
    val, messages = {image_path(root, entry): entry.image for entry in layout.val.entries}, []
    for name in ("labeled", "unlabeled"):
        split = getattr(layout, name)
        shared = sorted({val[path] for path in (image_path(root, entry) for entry in split.entries) if path in val})
        if shared:
            messages.append(
                f"{split.where}: {len(shared)} {name} images are validation images too ({layout.val.where}), which "
                f"inflates scores: {first_names(shared, _REPORTED)}; to allow it set config.data.val_overlap=allow"
            )
    return messages


def unused_masks(root: str, data, layout: Layout) -> list[str]:
    """Returns the files in the mask folders that belong to no labeled and no validation image."""
    folders = data.folders
    if data.split or not folders.labeled:
        return []
    used = {os.path.normpath(entry.mask) for entry in (*layout.labeled.entries, *layout.val.entries)}
    unused = []
    for key, masks in (("labeled", folders.masks), ("val", folders.val_masks)):
        if masks and not folders[key].endswith(LIST_SUFFIX):
            names = (os.path.join(masks, name) for name in images_below(os.path.join(root, masks)))
            own = (name for name in names if _is_mask(name, folders[key], masks, folders.mask_suffix))
            unused += [name for name in own if os.path.normpath(name) not in used]
    return unused


def _subtract(root: str, entries: list[Entry], others: Iterable[Entry]) -> list[Entry]:
    """Returns the entries whose image is not one of `others`."""
    paths = {image_path(root, entry) for entry in others}
    return [entry for entry in entries if image_path(root, entry) not in paths]
