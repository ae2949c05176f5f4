"""Split lists: which images are labeled, which are not, and which validate. Text files, one `image mask` a line."""

import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from input_pipeline.errors import DataError, did_you_mean

LABELED, UNLABELED, VAL = "labeled.txt", "unlabeled.txt", "val.txt"
SPLIT_LISTS = (LABELED, UNLABELED)  # Those in the folder of a split; VAL is beside these folders.
_REPORTED = 5  # Wrong lines named in one message.
_BLANK = re.compile(r"\s")


class SplitLists(NamedTuple):
    """Paths of the lists of a split."""

    labeled: str
    unlabeled: str
    val: str


class Entry(NamedTuple):
    """A line of a list: paths as written, relative to the data root; `mask` is None where the line has none."""

    image: str
    mask: str | None


def find_split(root: str, splits: str, split: str, needed: Sequence[str] = SplitLists._fields) -> SplitLists:
    """Returns the lists SPLITS/SPLIT/{labeled,unlabeled}.txt and SPLITS/val.txt.

    Args:
      root: the data root.
      splits: folder of the splits: absolute, else under `root`, else under the current folder. The first of these that
        has a folder `split` is taken; where only `val` is needed and none has it, the first that has a val.txt.
      split: name of the split.
      needed: names of the lists that must exist.

    Raises:
      DataError: no such folder, naming the nearest and all existing splits; or a list is missing.
    """
    if os.path.isabs(os.path.expanduser(splits)):
        folders = [os.path.expanduser(splits)]
    else:
        folders = [os.path.join(root, splits), os.path.abspath(splits)]
    having = [f for f in folders if split and os.path.isdir(os.path.join(f, split))]
    if tuple(needed) == ("val",):
        having += [f for f in folders if os.path.isfile(os.path.join(f, VAL))]
    if not having:
        raise DataError(_unknown_split(folders, split))
    folder = having[0]
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
    return f"{problem} in {' or '.join(present)}{hint}; splits there: {', '.join(known) or 'none'}"


def read_list(path: str, labeled: bool) -> list[Entry]:
    """Returns the entries of a list; see `parse_list`. Raises DataError if anything is wrong with it."""
    entries, wrong = parse_list(path, labeled)
    if wrong:
        more = f"\n... {len(wrong)} lines of {path}" if len(wrong) > _REPORTED else ""
        raise DataError("\n".join(wrong[:_REPORTED]) + more)
    return entries


def parse_list(path: str, labeled: bool) -> tuple[list[Entry], list[str]]:
    """Reads a list of `image mask` lines; blank lines are skipped.

    Columns are separated by blanks; in a line that holds a tab by tabs, so that names may hold blanks there.

    Args:
      path: the text file.
      labeled: whether every line must name a mask; where not, a line may be an image alone.

    Returns:
      The entries of the good lines, and what is wrong: the file is missing, is not text, is empty, or a line has a
      wrong number of columns.
    """
    try:
        # utf-8-sig: some editors begin a file with a byte order mark, which would become part of the first name.
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return [], [f"missing list {path}"]
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{path}: cannot be read as a text list: {error}"]
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
    """Writes the line of an entry, so that `parse_list` reads it back.

    Raises:
      DataError: a name that no line can hold.
    """
    names = [name for name in entry if name is not None]
    for name in names:
        if name != name.strip() or len(name.splitlines()) != 1 or "\t" in name or not name.isprintable():
            raise DataError(
                f"{name!r}: a name that a list cannot hold: it begins or ends with a blank, or has a tab, a line break "
                "or characters that are not UTF-8; rename the file"
            )
    if not any(map(_BLANK.search, names)):
        return " ".join(names)
    return "\t".join(names) + ("\t" if len(names) == 1 else "")


def format_list(entries: Iterable[Entry]) -> str:
    """Returns the text of a list; raises DataError as `format_entry` does."""
    return "".join(f"{format_entry(entry)}\n" for entry in entries)


def _parse(line: str, where: str, labeled: bool) -> Entry:
    columns = [column.strip() for column in line.split("\t") if column.strip()] if "\t" in line else line.split()
    if len(columns) == 2:
        return Entry(*columns)
    if len(columns) == 1 and not labeled:
        return Entry(columns[0], None)
    expected = "`image mask`" if labeled else "`image mask` or `image`"
    spaces = " (names with spaces need a tab between the columns)" if len(columns) > 2 else ""
    plural = "" if len(columns) == 1 else "s"
    raise DataError(f"{where}: found {len(columns)} column{plural}, {line.strip()!r}; expected {expected}{spaces}")
