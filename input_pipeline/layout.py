"""Which files are labeled, unlabeled and validation images: told by split lists, or by folders of images and masks."""

import collections
import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from input_pipeline import split_lists
from input_pipeline.errors import DataError
from input_pipeline.sources.images import LIST_SUFFIX, images_below
from input_pipeline.split_lists import Entry

UNMASKED = ("refuse", "unlabeled")
OVERLAP = ("allow", "refuse")
_REPORTED = 5  # Files named in one message.


class SplitEntries(NamedTuple):
    """The images of a split: labeled, unlabeled or validation."""

    entries: list[Entry]
    where: str  # The list or folder that names them, for messages.


class Layout(NamedTuple):
    """The images that a `config.data` names; no image was opened.

    Attributes:
      labeled: entries with masks.
      unlabeled: entries whose masks, if any, are not read. Where nothing else is named, the labeled ones.
      val: entries with masks.
      defects: what must be fixed, each naming its files.
    """

    labeled: SplitEntries
    unlabeled: SplitEntries
    val: SplitEntries
    defects: tuple[str, ...]


SPLITS = Layout._fields[:3]


def find_layout(data, splits: Sequence[str] = SPLITS) -> Layout:
    """Finds the images of a `config.data`: those of the lists of `data.split`, or else of `data.folders`.

    Args:
      data: `config.data`.
      splits: names of the splits to look for. Lists and folders that these do not need are neither read nor required,
        and a split that was not asked for may be empty in the result.

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
        empty = [name for name in splits if not getattr(layout, name).entries]
        layout = layout._replace(defects=tuple(f"{getattr(layout, name).where}: no {name} images" for name in empty))
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


def first_lines(messages: Sequence[str]) -> str:
    """Returns the first of several messages, and how many there are."""
    more = [f"... {len(messages)} in all"] if len(messages) > _REPORTED else []
    return "\n".join([*messages[:_REPORTED], *more])


def image_path(root: str, entry: Entry) -> str:
    """Returns the path of the image, alike for all entries that write it in different ways."""
    return os.path.normpath(os.path.join(root, entry.image))


def shuffled(entries: Iterable[Entry], salt: str) -> list[Entry]:
    """Returns entries in an order that looks random and depends on their names and on `salt` alone.

    By digests, not by a generator of random numbers: the same on every machine and with every version of NumPy, and
    hardly changed when images are added.
    """

    def key(entry: Entry):
        return hashlib.sha256(os.fsencode(f"{salt}\n{entry.image}")).digest(), entry.image

    return sorted(entries, key=key)


def held_out_fraction(folders) -> float | None:
    """Returns the part of the labeled images that `data.folders.val` holds out; None if it is a folder or a list.

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
    """Returns how many images a fraction is: at least one, and not all."""
    return max(0, min(max(1, round(fraction * images)), images - 1))


def _from_lists(lists: split_lists.SplitLists, splits: Sequence[str]) -> Layout:
    layout, defects = _empty_layout(), []
    for name in splits:
        path = getattr(lists, name)
        entries, wrong = split_lists.parse_list(path, labeled=name != "unlabeled")
        layout = layout._replace(**{name: SplitEntries(entries, path)})
        defects += wrong
    return layout._replace(defects=tuple(defects))


def _empty_layout() -> Layout:
    return Layout(*[SplitEntries([], "")] * len(SPLITS), ())


def _val_from_folders(root: str, folders) -> Layout:
    defects = []
    labeled = []
    if held_out_fraction(folders) is not None:
        labeled, _ = _with_masks(root, folders, "labeled", folders.masks, defects)
    val = _val_entries(root, folders, labeled, defects)
    return _empty_layout()._replace(val=val, defects=tuple(defects))


def _val_entries(root: str, folders, labeled: list[Entry], defects: list[str]) -> SplitEntries:
    """Returns the validation images: those of `folders.val`, or a fraction of the labeled ones."""
    fraction = held_out_fraction(folders)
    if fraction is None:
        val, without = _with_masks(root, folders, "val", folders.val_masks or folders.masks, defects)
        defects += _missing_masks(without, "validation images")
        return SplitEntries(val, os.path.join(root, folders.val))
    val = sorted(shuffled(labeled, "validation")[: held_out_count(fraction, len(labeled))])
    if not val:
        defects.append(f"no validation image: {fraction} of {len(labeled)} labeled images (config.data.folders.val)")
    return SplitEntries(val, os.path.join(root, folders.labeled))


def _from_folders(root: str, data) -> Layout:
    folders, defects = data.folders, []
    labeled, unmasked = _with_masks(root, folders, "labeled", folders.masks, defects)
    unlabeled = _entries(root, folders, "unlabeled", defects) if folders.unlabeled else []
    fraction = held_out_fraction(folders)
    val = _val_entries(root, folders, labeled, defects)

    def without_val(entries: list[Entry], where: str) -> list[Entry]:
        # A fraction is held out. Of what the user named, a folder means all that is in it but what validates; a list
        # means each image of it, which `overlaps` looks at.
        if fraction is None and (data.val_overlap == "allow" or where.endswith(LIST_SUFFIX)):
            return entries
        return _subtract(root, entries, val.entries)

    labeled, unmasked = (without_val(entries, folders.labeled) for entries in (labeled, unmasked))
    unlabeled = without_val(unlabeled, folders.unlabeled)
    unmasked = _subtract(root, unmasked, unlabeled)
    if folders.unmasked == "unlabeled":
        unlabeled = [*unmasked, *unlabeled]
    else:
        defects += _missing_masks(
            unmasked, f"images in {folders.labeled}",
            "; to take them as unlabeled images say config.data.folders.unmasked=unlabeled",
        )  # fmt: skip
    return Layout(
        SplitEntries(labeled, os.path.join(root, folders.labeled)),
        SplitEntries(unlabeled or labeled, os.path.join(root, folders.unlabeled or folders.labeled)),
        val,
        tuple(defects),
    )


def _entries(root: str, folders, key: str, defects: list[str]) -> list[Entry]:
    """The images of a folder, without masks, or the entries of a list."""
    where, what = folders[key], f"config.data.folders.{key}"
    path = os.path.join(root, where)
    if os.path.isdir(path):
        found = [Entry(os.path.join(where, name), None) for name in images_below(path)]
        if not found:
            defects.append(f"{path}: no image in this folder ({what})")
        return found
    if not os.path.isfile(path) or not path.endswith(LIST_SUFFIX):
        raise DataError(f"{path}: no such folder, nor a list ({LIST_SUFFIX}) ({what})")
    found, wrong = split_lists.parse_list(path, labeled=key != "unlabeled")
    defects += wrong
    return found


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
    pairs, alone, used = [], [], {}
    for image, _ in images:
        if _is_mask(os.path.join(root, image), image_folder, mask_folder, folders.mask_suffix):
            continue
        stem = os.path.splitext(os.path.relpath(image, folders[key]))[0] + folders.mask_suffix
        found = by_stem.get(stem, [])
        if len(found) > 1:
            defects.append(f"{os.path.join(root, image)}: several masks, {names_of(found)}; expected one")
        elif not found:
            alone.append(Entry(image, None))
        elif found[0] in used:
            defects.append(f"{os.path.join(root, found[0])}: mask of two images, {used[found[0]]} and {image}")
        else:
            used[found[0]] = image
            pairs.append(Entry(image, found[0]))
    return pairs, alone


def _is_mask(path: str, images: str, masks: str, suffix: str) -> bool:
    """Whether a file below the folder `images` is a mask: masks may lie in a folder in it, or beside the images."""
    if os.path.normpath(images) == os.path.normpath(masks):
        return bool(suffix) and os.path.splitext(path)[0].endswith(suffix)
    return not os.path.relpath(path, masks).startswith(os.pardir)


def _missing_masks(entries: Sequence[Entry], what: str, advice: str = "") -> list[str]:
    """Says, if there are any, that entries have no mask."""
    if not entries:
        return []
    names = names_of([entry.image for entry in entries])
    return [f"{len(entries)} {what} have no mask: {names}{advice}"]


def overlaps(root: str, layout: Layout) -> list[str]:
    """Says which validation images are trained on too."""
    val, found = {image_path(root, entry): entry.image for entry in layout.val.entries}, []
    for name in ("labeled", "unlabeled"):
        part = getattr(layout, name)
        both = sorted({val[path] for path in (image_path(root, entry) for entry in part.entries) if path in val})
        if both:
            found.append(
                f"{part.where}: {len(both)} {name} images are validation images too ({layout.val.where}), so that "
                f"scores would flatter: {names_of(both)}; to allow it say config.data.val_overlap=allow"
            )
    return found


def unused_masks(root: str, data, layout: Layout) -> list[str]:
    """Returns the files in the folders of masks that are the mask of no labeled and no validation image."""
    folders = data.folders
    if data.split or not folders.labeled:
        return []
    used = {os.path.normpath(entry.mask) for entry in (*layout.labeled.entries, *layout.val.entries)}
    found = []
    for key, masks in (("labeled", folders.masks), ("val", folders.val_masks)):
        if masks and not folders[key].endswith(LIST_SUFFIX):
            names = (os.path.join(masks, name) for name in images_below(os.path.join(root, masks)))
            own = (name for name in names if _is_mask(name, folders[key], masks, folders.mask_suffix))
            found += [name for name in own if os.path.normpath(name) not in used]
    return found


def _subtract(root: str, entries: list[Entry], others: Iterable[Entry]) -> list[Entry]:
    """Returns the entries whose image is not one of `others`."""
    paths = {image_path(root, entry) for entry in others}
    return [entry for entry in entries if image_path(root, entry) not in paths]


def names_of(names: Sequence[str]) -> str:
    """Returns the first of several names, and how many there are."""
    return ", ".join(names[:_REPORTED]) + (f", ... ({len(names)} in all)" if len(names) > _REPORTED else "")
