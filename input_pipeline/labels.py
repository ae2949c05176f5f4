"""Masks to class ids: which value of a mask means which class."""

import csv
import functools
import json
import os
import re
from collections.abc import Sequence

import numpy as np

from input_pipeline import decode
from input_pipeline.decode import Encoded
from input_pipeline.errors import DataError, did_you_mean, first_names, printable
from input_pipeline.files import read_text

IGNORE = "ignore"  # The class of ignored pixels in a label map.
_COLORS = 1 << 24
_UNCOVERED = 256  # Entry of the lookup table for values without a class.


class Labels:
    """Decodes masks to class ids.

    Attributes:
      classes: names, in the order of the ids.
      ignore: id of ignored pixels in the result of `decode`.
      colors: whether the values of masks are colors, as in a label map of colors; else ids.
    """

    def __init__(
        self, classes: Sequence[str], ignore: int = 255, ignore_values: Sequence[int] = (), label_map: str = ""
    ):
        """Reads the label map.

        Args:
          classes: names, in the order of the ids.
          ignore: id of ignored pixels, excluded from losses and scores.
          ignore_values: further mask values to ignore; only without a label map.
          label_map: path of the file that maps values to classes, see `read_label_map`; "": values are class ids, or
            `ignore`.

        Raises:
          DataError: values that do not fit, or a label map that cannot be used.
        """
        if not (0 < len(classes) <= 256 and 0 <= ignore <= 255):
            raise DataError(f"{len(classes)} classes and ignored value {ignore} do not fit in 8-bit masks")
        self.classes, self.ignore, self._map_path = tuple(classes), ignore, label_map
        self.colors = False
        if label_map:
            if ignore_values:
                raise DataError(
                    f"config.data.ignore_values is {tuple(ignore_values)} and config.data.label_map {label_map}; "
                    f"expected ignored values in the map, as lines `VALUE {IGNORE}`"
                )
            self.colors, self._id_of = read_label_map(label_map, self.classes, ignore)
            self._expected = f"those of the label map {label_map}"
        else:
            _check_ids(ignore_values)
            self._id_of = {value: value for value in range(len(classes))}
            self._id_of |= dict.fromkeys((*ignore_values, ignore), ignore)
            ignored = ", ".join(map(str, dict.fromkeys((ignore, *ignore_values))))
            self._expected = (
                f"class ids 0..{len(classes) - 1} ({len(classes)} classes) or {ignored} (ignored); "
                "config.data.label_map can map other values"
            )

    @classmethod
    def from_config(cls, data) -> "Labels":
        """Builds the labels of a `config.data`; looks for a label map under `data.root`, then in the current folder."""
        if not data.classes:
            raise DataError(
                "config.data.classes is empty; expected the class names in the order of the ids in the masks"
            )
        path = os.path.expanduser(data.label_map)
        under_root = os.path.join(os.path.expanduser(data.root), path)
        label_map = under_root if path and os.path.isfile(under_root) else path
        return cls(data.classes, data.ignore, data.ignore_values, label_map)

    def decode(self, mask: Encoded) -> np.ndarray:
        """Returns the class ids, uint8 [H, W]; raises DataError as `raw` and `to_ids` do."""
        return self.to_ids(self.raw(mask), mask.shown)

    def size(self, mask: Encoded) -> tuple[int, int]:
        """Returns (H, W) from the header; raises DataError for a mask that `raw` refuses by its header."""
        return decode.mask_size(mask, self.colors)

    def raw(self, mask: Encoded) -> np.ndarray:
        """Returns the values of a mask before the mapping, integers [H, W]; see `decode.mask`."""
        return decode.mask(mask, self.colors)

    def to_ids(self, raw: np.ndarray, where: str) -> np.ndarray:
        """Maps the values from `raw` to class ids, uint8 [H, W].

        Raises:
          DataError: values without a class; `where` names the mask.
        """
        ids = self._lookup(raw)
        if ids.max(initial=0) == _UNCOVERED:
            values = first_names(self.uncovered(raw), 10, self.text)
            raise DataError(f"{where}: mask values {values} found; expected {self._expected}")
        return ids.astype(np.uint8)

    def uncovered(self, raw: np.ndarray) -> list[int]:
        """Returns the distinct values from `raw` that have no class."""
        return np.unique(raw[self._lookup(raw) == _UNCOVERED]).tolist()

    def text(self, value: int) -> str:
        """Formats a mask value as users write it: an id, or (red, green, blue)."""
        return f"({value >> 16}, {value >> 8 & 255}, {value & 255})" if self.colors else str(value)

    def _lookup(self, raw: np.ndarray) -> np.ndarray:
        """Returns the class id of each value, or _UNCOVERED, uint16 [H, W]."""
        return _table(_COLORS if self.colors else decode.MOST_IDS, tuple(self._id_of.items()))[raw]


@functools.lru_cache(maxsize=4)
def _table(size: int, id_of: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Returns the lookup table from values to class ids, uint16 [size].

    It is not kept in Labels because that of colors is large and Labels are pickled.
    """
    table = np.full(size, _UNCOVERED, np.uint16)
    values, ids = np.array(id_of).T
    table[values] = ids
    return table


def read_label_map(path: str, classes: Sequence[str], ignore: int) -> tuple[bool, dict[int, int]]:
    """Reads a label map: the class of each mask value.

    Text and CSV files have one line per value, `ID CLASS` or `RED GREEN BLUE CLASS`, with columns separated by commas,
    tabs or spaces. The first line may name the columns (id; red, green, blue or r, g, b; class or name), in any order.
    Lines that start with # are skipped. A JSON file holds an object {"ID" or "RED GREEN BLUE": CLASS}. A class is a
    name of `classes`, an id, or "ignore"; several values may share a class.

    Returns:
      Whether the values are colors, and the class id of each value (colors as R * 65536 + G * 256 + B).

    Raises:
      DataError: naming file and line.
    """
    try:
        text = read_text(path, "a label map")
    except FileNotFoundError:
        raise DataError(f"missing label map {path} (config.data.label_map)") from None
    except DataError as error:
        raise DataError(f"{error} (config.data.label_map)") from None
    rows = _json_rows(text, path) if path.lower().endswith(".json") else _text_rows(text, path)
    id_of, colors = {}, None
    for where, numbers, name in rows:
        _check_numbers(numbers, where)
        if colors not in (None, len(numbers) == 3):
            raise DataError(f"{where}: the label map mixes ids and colors")
        colors = len(numbers) == 3
        value = functools.reduce(lambda packed, number: packed << 8 | number, numbers)
        class_id = _class_id(name, classes, ignore, where)
        if id_of.setdefault(value, class_id) != class_id:
            raise DataError(f"{where}: {' '.join(map(str, numbers))} has two classes in this label map")
    if not id_of:
        raise DataError(f"{path}: the label map is empty; expected lines `ID CLASS` or `RED GREEN BLUE CLASS`")
    return bool(colors), id_of


_Row = tuple[str, list[int], str]  # File and line, for messages; the id, or red, green and blue; the class.


def _json_rows(text: str, path: str) -> list[_Row]:
    expected = 'expected a JSON object {"ID" or "RED GREEN BLUE": CLASS}'
    try:
        # As a tuple of pairs: in a dict the last one of equal keys would count.
        content = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}; {expected}") from None
    if not isinstance(content, tuple):
        raise DataError(f"{path}: {expected}")
    rows = []
    for key, name in content:
        where = f"{path}: key '{_shown(key)}'"
        if type(name) not in (str, int):
            raise DataError(f"{where}: its value is neither text nor an integer; {expected}")
        rows.append((where, _numbers(re.findall(r"[^\s,]+", key), where), str(name)))
    return rows


def _text_rows(text: str, path: str) -> list[_Row]:
    rows, header = [], None
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}:{number}"
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        columns = _columns(line, where)
        if not rows and header is None and not any(map(_is_number, columns)):
            header = _header(columns, where)
            continue
        if header is None:
            count = 3 if len(columns) > 3 and all(map(_is_number, columns[:3])) else 1
            values, name = columns[:count], " ".join(columns[count:])
        elif len(columns) != len(header):
            raise DataError(
                f"{where}: found {len(columns)} columns; expected {len(header)}: {_shown(', '.join(header))}"
            )
        else:
            row = dict(zip(header, columns, strict=True))
            values, name = [row[key] for key in ("id", "r", "g", "b") if key in row], row["class"]
        if not name:
            raise DataError(f"{where}: found '{_shown(line.strip())}'; expected `ID CLASS` or `RED GREEN BLUE CLASS`")
        rows.append((where, _numbers(values, where), name))
    return rows


def _shown(value) -> str:
    """Formats what a label map holds, however long, for messages."""
    return printable(str(value), 80)


def _columns(line: str, where: str) -> list[str]:
    for separator in (",", "\t"):
        if separator in line:
            try:
                columns = [column.strip() for column in next(csv.reader([line], delimiter=separator))]
            except csv.Error as error:
                raise DataError(f"{where}: found '{_shown(line)}', not CSV: {error}") from None
            # Lines such as "64 128 64<tab>Animal" hold both separators.
            return [*columns[0].split(), *columns[1:]] if separator == "\t" else columns
    return line.split()


def _header(columns: list[str], where: str) -> list[str]:
    short = {"red": "r", "green": "g", "blue": "b", "name": "class"}
    names = [short.get(column.lower(), column.lower()) for column in columns]
    values = [name for name in ("id", "r", "g", "b") if name in names]
    if "class" not in names or values not in (["id"], ["r", "g", "b"]) or len(names) != len(set(names)):
        raise DataError(
            f"{where}: found '{_shown(', '.join(columns))}'; expected `ID CLASS`, `RED GREEN BLUE CLASS`, or names of "
            "columns: id or red, green, blue; and class"
        )
    return names


def _is_number(text: str) -> bool:
    return bool(re.fullmatch("[0-9]{1,9}", text))  # More digits would be no number of any use.


def _numbers(texts: list[str], where: str) -> list[int]:
    if len(texts) not in (1, 3) or not all(map(_is_number, texts)):
        raise DataError(f"{where}: found '{_shown(' '.join(texts))}'; expected an id, or red, green and blue")
    return [int(text) for text in texts]


def _check_numbers(numbers: list[int], where: str) -> None:
    most = 255 if len(numbers) == 3 else decode.MOST_IDS - 1
    if max(numbers) > most:
        raise DataError(f"{where}: value {max(numbers)}; expected 0..{most}")


def _check_ids(ignore_values: Sequence[int]) -> None:
    for value in ignore_values:
        if not 0 <= value < decode.MOST_IDS:
            raise DataError(f"config.data.ignore_values has {value}; expected 0..{decode.MOST_IDS - 1}")


def _class_id(name: str, classes: Sequence[str], ignore: int, where: str) -> int:
    ids = {classes.index(name)} if name in classes else set()
    if name == IGNORE:
        ids.add(ignore)
    if _is_number(name) and int(name) in (*range(len(classes)), ignore):
        ids.add(int(name))
    if len(ids) == 1:
        return ids.pop()
    expected = f"{first_names(classes, 20)} (config.data.classes), an id below {len(classes)}, or {IGNORE}"
    if ids:
        other = "ignored pixels" if name == IGNORE else f"the class id {name}"
        raise DataError(f"{where}: '{name}' is a class (config.data.classes) and also means {other}; rename the class")
    hint = did_you_mean(name, classes) if len(name) < 100 else ""
    raise DataError(f"{where}: no class '{_shown(name)}'{hint or ';'} expected {expected}")
