"""Labels: which values of a mask mean which class."""

import csv
import functools
import json
import os
import re
from collections.abc import Sequence

import numpy as np

from input_pipeline import decode
from input_pipeline.decode import Encoded
from input_pipeline.errors import DataError, did_you_mean

IGNORE = "ignore"  # What a label map calls the ignored pixels.
_COLORS = 1 << 24
_UNCOVERED = 256  # In tables, of values that mean nothing.
_REPORTED = 10  # Values named in one message.


class Labels:
    """Decodes masks to class ids.

    Attributes:
      classes: names, in the order of the ids.
      ignore: value of ignored pixels in what `decode` returns.
      colors: whether the values of masks are colors, which a label map told; else ids.
    """

    def __init__(
        self, classes: Sequence[str], ignore: int = 255, ignore_values: Sequence[int] = (), label_map: str = ""
    ):
        """Reads the label map.

        Args:
          classes: names.
          ignore: value of ignored pixels, which no loss and no score counts.
          ignore_values: further values of masks that are ignored; without a label map.
          label_map: path of the file that says which value means which class, see `read_label_map`; "": values are
            class ids, or `ignore`.

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
                    f"config.data.ignore_values is {tuple(ignore_values)} and config.data.label_map {label_map}; with "
                    f"a map, ignored values stand there, as `VALUE {IGNORE}`"
                )
            self.colors, self._meaning = read_label_map(label_map, self.classes, ignore)
            self._expected = f"those of the label map {label_map}"
        else:
            _check_ids(ignore_values)
            self._meaning = {value: value for value in range(len(classes))}
            self._meaning |= dict.fromkeys((*ignore_values, ignore), ignore)
            ignored = ", ".join(map(str, dict.fromkeys((ignore, *ignore_values))))
            self._expected = (
                f"class ids 0..{len(classes) - 1} ({len(classes)} classes) or {ignored} (ignored); "
                "config.data.label_map can map other values"
            )

    @classmethod
    def from_config(cls, data) -> "Labels":
        """Makes those of a `config.data`; a label map is looked up under `data.root`, then in the current folder."""
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
        return self.to_ids(self.raw(mask), mask.where)

    def size(self, mask: Encoded) -> tuple[int, int]:
        """Returns (H, W), from the header; raises DataError for a mask that `raw` refuses by its header."""
        return decode.mask_size(mask, self.colors)

    def raw(self, mask: Encoded) -> np.ndarray:
        """Returns the values of a mask before they are mapped, integers [H, W]; see `decode.mask`."""
        return decode.mask(mask, self.colors)

    def to_ids(self, raw: np.ndarray, where: str) -> np.ndarray:
        """Maps the values that `raw` returned to class ids, uint8 [H, W].

        Raises:
          DataError: values that no class covers.
        """
        ids = self._lookup(raw)
        if ids.max(initial=0) == _UNCOVERED:
            values = ", ".join(map(self.text, self.uncovered(raw)[:_REPORTED]))
            raise DataError(f"{where}: mask values {values} found; expected {self._expected}")
        return ids.astype(np.uint8)

    def uncovered(self, raw: np.ndarray) -> list[int]:
        """Returns the different values, of those that `raw` returned, that no class covers."""
        return np.unique(raw[self._lookup(raw) == _UNCOVERED]).tolist()

    def text(self, value: int) -> str:
        """Writes a value of a mask as a user would: an id, or red, green and blue."""
        return f"({value >> 16}, {value >> 8 & 255}, {value & 255})" if self.colors else str(value)

    def _lookup(self, raw: np.ndarray) -> np.ndarray:
        """The class id of each value, or _UNCOVERED, uint16 [H, W]."""
        return _table(_COLORS if self.colors else decode.MOST_IDS, tuple(self._meaning.items()))[raw]


@functools.lru_cache(maxsize=4)
def _table(size: int, meaning: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The class id of each value, uint16 [size]. Not in Labels: that of colors is large, and Labels are pickled."""
    table = np.full(size, _UNCOVERED, np.uint16)
    values, ids = np.array(meaning).T
    table[values] = ids
    return table


def read_label_map(path: str, classes: Sequence[str], ignore: int) -> tuple[bool, dict[int, int]]:
    """Reads which value of a mask means which class.

    Text and CSV files have a line a value, `ID CLASS` or `RED GREEN BLUE CLASS`, columns separated by commas, tabs or
    spaces. The first line may name the columns (id; red, green, blue or r, g, b; class or name), in any order. Lines
    that begin with # are skipped. A JSON file holds an object {"ID" or "RED GREEN BLUE": CLASS}. A class is a name of
    `classes`, an id, or "ignore"; several values may mean one class.

    Returns:
      Whether the values are colors, and the class id of each value (colors as R * 65536 + G * 256 + B).

    Raises:
      DataError: naming file and line.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        rows = _json_rows(text, path) if path.lower().endswith(".json") else _text_rows(text, path)
    except FileNotFoundError:
        raise DataError(f"missing label map {path} (config.data.label_map)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a label map: {error}") from None
    meaning, colors = {}, None
    for where, numbers, name in rows:
        _check_numbers(numbers, where)
        if colors not in (None, len(numbers) == 3):
            raise DataError(f"{where}: the label map mixes ids and colors")
        colors = len(numbers) == 3
        value = functools.reduce(lambda packed, number: packed << 8 | number, numbers)
        known = _class_id(name, classes, ignore, where)
        if meaning.setdefault(value, known) != known:
            raise DataError(f"{where}: {' '.join(map(str, numbers))} means two classes in this label map")
    if not meaning:
        raise DataError(f"{path}: the label map is empty; expected lines `ID CLASS` or `RED GREEN BLUE CLASS`")
    return bool(colors), meaning


_Row = tuple[str, list[int], str]  # Where it stands, the id or the three channels, the class.


def _json_rows(text: str, path: str) -> list[_Row]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f'{path}: expected a JSON object {{"ID" or "RED GREEN BLUE": CLASS}}')
    return [
        (f"{path}: key {key!r}", _numbers(re.findall(r"[^\s,]+", key), f"{path}: key {key!r}"), str(name))
        for key, name in content.items()
    ]


def _text_rows(text: str, path: str) -> list[_Row]:
    rows, header = [], None
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}:{number}"
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        columns = _columns(line)
        if not rows and header is None and not any(map(_is_number, columns)):
            header = _header(columns, where)
            continue
        if header is None:
            count = 3 if len(columns) > 3 and all(map(_is_number, columns[:3])) else 1
            values, name = columns[:count], " ".join(columns[count:])
        elif len(columns) != len(header):
            raise DataError(f"{where}: found {len(columns)} columns; expected {len(header)}: {', '.join(header)}")
        else:
            row = dict(zip(header, columns, strict=True))
            values, name = [row[key] for key in ("id", "r", "g", "b") if key in row], row["class"]
        if not name:
            raise DataError(f"{where}: found {line.strip()!r}; expected `ID CLASS` or `RED GREEN BLUE CLASS`")
        rows.append((where, _numbers(values, where), name))
    return rows


def _columns(line: str) -> list[str]:
    for separator in (",", "\t"):
        if separator in line:
            columns = [column.strip() for column in next(csv.reader([line], delimiter=separator))]
            # Lines like "64 128 64<tab>Animal" have both.
            return [*columns[0].split(), *columns[1:]] if separator == "\t" else columns
    return line.split()


def _header(columns: list[str], where: str) -> list[str]:
    short = {"red": "r", "green": "g", "blue": "b", "name": "class"}
    names = [short.get(column.lower(), column.lower()) for column in columns]
    values = [name for name in ("id", "r", "g", "b") if name in names]
    if "class" not in names or values not in (["id"], ["r", "g", "b"]) or len(names) != len(set(names)):
        raise DataError(
            f"{where}: found {', '.join(columns)}; expected `ID CLASS`, `RED GREEN BLUE CLASS`, or names of columns: "
            "id or red, green, blue; and class"
        )
    return names


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"\d+", text))


def _numbers(texts: list[str], where: str) -> list[int]:
    if len(texts) not in (1, 3) or not all(map(_is_number, texts)):
        raise DataError(f"{where}: found {' '.join(texts)!r}; expected an id, or red, green and blue")
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
    if name in classes:
        return classes.index(name)
    if name == IGNORE:
        return ignore
    if _is_number(name) and int(name) in (*range(len(classes)), ignore):
        return int(name)
    raise DataError(
        f"{where}: no class {name!r}{did_you_mean(name, classes) or ';'} expected {', '.join(classes)} "
        f"(config.data.classes), an id below {len(classes)}, or {IGNORE}"
    )


def read_class_names(path: str) -> tuple[str, ...]:
    """Reads a file of one class name a line, in the order of the ids in the masks, from 0.

    Raises:
      DataError: no such file, or one that does not name 2 to 255 different classes.
    """
    expected = "expected the names of the classes, one a line, in the order of the ids in the masks, from 0"
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = [line.strip() for line in file.read().rstrip().splitlines()]
    except FileNotFoundError:
        raise DataError(f"missing file {path}; {expected}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}; {expected}") from None
    if "" in names:  # Left out, it would shift the ids of the classes below it.
        raise DataError(f"{path}:{names.index('') + 1}: an empty line; {expected}")
    again = next((number for number, name in enumerate(names, 1) if name in names[: number - 1]), None)
    if again:
        raise DataError(f"{path}:{again}: {names[again - 1]!r} a second time; {expected}")
    if not 2 <= len(names) <= 255:
        raise DataError(f"{path}: {len(names)} names; {expected}: 2 to 255 of them")
    return tuple(names)
