"""Split lists: text files of lines `image mask` that name the labeled, unlabeled and validation images."""

import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from input_pipeline.errors import DataError, did_you_mean, first_messages, printable
from input_pipeline.files import CONTROL_CHARACTER, read_text

LIST_SUFFIX = ".txt"
LABELED, UNLABELED, VAL = "labeled.txt", "unlabeled.txt", "val.txt"
SPLIT_LISTS = (LABELED, UNLABELED)  # In the folder of a split; VAL is next to these folders.
_BLANK = re.compile(r"\s")


class SplitLists(NamedTuple):
    """Paths of the lists of a split."""

    labeled: str
    unlabeled: str
    val: str


class Entry(NamedTuple):
    """A line of a list: paths as written, relative to the data root; `mask` is None if the line has none."""

    image: str
    mask: str | None


def find_split(root: str, splits: str, split: str, needed: Sequence[str] = SplitLists._fields) -> SplitLists:
    """Returns the lists SPLITS/SPLIT/{labeled,unlabeled}.txt and SPLITS/val.txt.

    Args:
      root: the data root.
      splits: folder of the splits: absolute, or relative to `root` or to the current folder. The first with a folder
        `split` is taken or, if only `val` is needed and there is none, the first with a val.txt.
      split: name of the split.
      needed: names of the lists that must exist.

    Raises:
      DataError: no such folder, with the nearest and all existing splits; or a missing list.
    """
    if os.path.isabs(os.path.expanduser(splits)):
        folders = [os.path.expanduser(splits)]
    else:
        folders = [os.path.join(root, splits), os.path.abspath(splits)]
    candidates = [f for f in folders if split and os.path.isdir(os.path.join(f, split))]
    if tuple(needed) == ("val",):
        candidates += [f for f in folders if os.path.isfile(os.path.join(f, VAL))]
    if not candidates:
        raise DataError(_unknown_split(folders, split))
    folder = candidates[0]
    lists = SplitLists(
        os.path.join(folder, split, LABELED), os.path.join(folder, split, UNLABELED), os.path.join(folder, VAL)
    )
    missing = [path for name, path in lists._asdict().items() if name in needed and not os.path.isfile(path)]
    if missing:
        raise DataError(f"split {split!r} of {folder}: missing list {', '.join(missing)}")
    return lists


def _unknown_split(folders: list[str], split: str) -> str:
    present = [f for f in folders if os.path.isdir(f)]
    if not present:
        return f"no folder of split lists: tried {' and '.join(folders)} (config.data.splits)"
    known = sorted({name for f in present for name in os.listdir(f) if os.path.isfile(os.path.join(f, name, LABELED))})
    hint = did_you_mean(split, known, cutoff=0.4)
    problem = f"no split {split!r}" if split else "config.data.split is not set: no split"
    there = f"splits there: {', '.join(known) or 'none'} (config.data.splits, config.data.split)"
    return f"{problem} in {' or '.join(present)}{hint}; {there}"


def read_list(path: str, labeled: bool) -> list[Entry]:
    """Returns the entries of a list; see `parse_list`. Raises DataError if anything is wrong with it."""
    entries, wrong = parse_list(path, labeled)
    if wrong:
        raise DataError(first_messages(wrong, f"lines of {path}"))
    return entries


def parse_list(path: str, labeled: bool) -> tuple[list[Entry], list[str]]:
    """Reads a list of `image mask` lines, skipping blank ones.

    Columns are separated by spaces or, in a line with a tab, by tabs, so that names may contain spaces.

    Args:
      path: the text file.
      labeled: whether every line must name a mask; if not, a line may hold an image alone.

    Returns:
      The entries of the valid lines, and error messages: the file is missing, is not text, is empty, or a line has the
      wrong number of columns or holds what is no path of a file.
    """
    try:
        lines = read_text(path, "a text list").split("\n")
    except FileNotFoundError:
        return [], [f"missing list {path}"]
    except DataError as error:
        return [], [str(error)]
    entries, wrong = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entries.append(_parse(line, f"{path}:{number}", labeled))
            except DataError as error:
                wrong.append(str(error))
    if not entries and not wrong:
        wrong.append(f"{path}: the list is empty; expected lines `image mask`")
    return entries, wrong


def format_entry(entry: Entry) -> str:
    """Returns the line of an entry, which `parse_list` reads back.

    Raises:
      DataError: a name that a line cannot hold.
    """
    names = [name for name in entry if name is not None]
    for name in names:
        if name != name.strip() or len(name.splitlines()) != 1 or "\t" in name or not name.isprintable():
            raise DataError(
                f"{name!r}: a name that a list cannot hold: it starts or ends with a space, or has a tab, a line break "
                "or characters that are not UTF-8; rename the file"
            )
    if not any(map(_BLANK.search, names)):
        return " ".join(names)
    return "\t".join(names) + ("\t" if len(names) == 1 else "")


def format_list(entries: Iterable[Entry]) -> str:
    """Returns the text of a list; raises DataError as `format_entry` does."""
    return "".join(f"{format_entry(entry)}\n" for entry in entries)


def _parse(line: str, where: str, labeled: bool) -> Entry:
    columns = [column.strip() for column in line.split("\t") if column.strip()]
    if "\t" not in line or (len(columns) == 1 and labeled):  # With masks, a tab at the end separates nothing.
        columns = line.split()
    for name in columns:
        if CONTROL_CHARACTER.search(name):
            raise DataError(f"{where}: '{printable(name)}' has control characters; expected the path of a file")
        if os.path.basename(name) in ("", os.curdir, os.pardir):
            raise DataError(f"{where}: '{printable(name)}' is a folder; expected the path of a file")
    if len(columns) == 2:
        return Entry(*columns)
    if len(columns) == 1 and not labeled:
        return Entry(columns[0], None)
    expected = "`image mask`" if labeled else "`image mask` or `image`"
    spaces = " (names with spaces need a tab between the columns)" if len(columns) > 2 else ""
    plural = "" if len(columns) == 1 else "s"
    content = printable(line.strip(), 200)
    raise DataError(f"{where}: found {len(columns)} column{plural}, '{content}'; expected {expected}{spaces}")
