"""Packed data sets: encoded images and masks in a few large ArrayRecord files, written by `--mode=records`.

FOLDER/index.json lists the records and the size and SHA-256 of each shard; FOLDER/*.array_record are the shards. A
record is the bytes of an image file, followed by a record with those of its mask file, if it has one. Split lists name
records by the paths of their images, just as they name files.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import NamedTuple

import grain

from input_pipeline.decode import Encoded
from input_pipeline.errors import DataError, first_names
from input_pipeline.files import read_text
from input_pipeline.labels import Labels
from input_pipeline.sources.encoded import EncodedSource, check_sizes
from input_pipeline.split_lists import Entry

INDEX, PROGRESS = "index.json", "progress"
FORMAT = "dssn_jax records 1"


class Row(NamedTuple):
    """Location and sizes of an image and its mask."""

    image: str
    mask: str | None
    shard: int
    position: int  # Index of the image in the shard; the mask is the next record.
    image_bytes: int
    mask_bytes: int
    size: tuple[int, int]  # H, W of the image.
    mask_size: tuple[int, int] | None


class Shard(NamedTuple):
    """An ArrayRecord file."""

    file: str
    records: int  # Images and masks.
    bytes: int
    sha256: str


class Index(NamedTuple):
    """The content of index.json; `inputs` is a digest of the names and sizes of the packed files."""

    inputs: str
    shards: tuple[Shard, ...]
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class WholeShard:
    """A read instruction for all records of a shard, which ArrayRecordDataSource accepts without opening the file."""

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


class RecordsSource(EncodedSource):
    """Images and masks of a packed data set."""

    def __init__(self, folder: str, index: Index, entries: Sequence[Entry], where: str, labels: Labels | None):
        """Opens no shard.

        Args:
          folder: folder of the packed data set.
          index: its index, from `read_index`.
          entries: images and masks of this source.
          where: the list that names them, for messages.
          labels: see `EncodedSource`; if not None, every entry names a mask.

        Raises:
          DataError: an entry that was not packed.
        """
        super().__init__(len(entries), where, labels)
        self._rows = _rows(folder, index, entries, where, labels is not None)
        self._starts = [sum(shard.records for shard in index.shards[:number]) for number in range(len(index.shards))]
        self._paths = [os.path.join(folder, shard.file) for shard in index.shards]
        self._records = grain.sources.ArrayRecordDataSource(
            [
                WholeShard(path, shard.records, shard.records)
                for path, shard in zip(self._paths, index.shards, strict=True)
            ]
        )

    def name(self, index: int) -> str:
        """Returns the path of the image as written in the list."""
        return self._rows[index].image

    def files(self, index: int) -> tuple[Encoded, Encoded | None]:
        """See `EncodedSource`."""
        row = self._rows[index]
        image = self._file(row, row.image, 0, row.image_bytes)
        return image, None if self.labels is None else self._file(row, row.mask, 1, row.mask_bytes)

    def _file(self, row: Row, name: str, place: int, size: int) -> Encoded:
        shard = self._paths[row.shard]
        return Encoded(functools.partial(self._read, row.shard, row.position + place, name, size), f"{name} in {shard}")

    def _read(self, shard: int, position: int, name: str, size: int) -> bytes:
        what = f"{self._paths[shard]}: damaged, record {position} ({name})"
        try:
            content = self._records[self._starts[shard] + position]
        except Exception as error:  # The C++ library raises several types.
            raise DataError(f"{what} cannot be read: {error}") from None
        if len(content) != size:
            raise DataError(f"{what} has {len(content)} bytes; expected {size}")
        return content

    def _read_header(self, index: int) -> tuple[int, int] | DataError:
        row = self._rows[index]
        if self.labels is not None and row.mask_size != row.size:
            try:
                image, mask = self.files(index)
                check_sizes(image, row.size, mask, row.mask_size)
            except DataError as error:
                return error
        return row.size


def _rows(folder: str, index: Index, entries: Sequence[Entry], where: str, labeled: bool) -> list[Row]:
    """Returns the rows of entries; raises DataError for entries that were not packed."""
    by_name = {row.image: row for row in index.rows}
    absent = [entry.image for entry in entries if entry.image not in by_name]
    if labeled:
        absent += [e.mask for e in entries if e.image in by_name and by_name[e.image].mask != e.mask]
    if absent:
        names = first_names(absent, 5)
        raise DataError(f"{where}: {len(absent)} images or masks are not in the packed data set {folder}: {names}")
    return [by_name[entry.image] for entry in entries]


def read_index(folder: str) -> Index:
    """Reads the index of a packed data set.

    Raises:
      DataError: no packed data set, an incomplete one, or a damaged index.
    """
    path = os.path.join(folder, INDEX)
    try:
        content = json.loads(read_text(path, "the index of a packed data set"))
        if content["format"] != FORMAT:
            raise DataError(f"{path}: format {content['format']!r}; expected {FORMAT!r}")
        shards = tuple(Shard(*shard) for shard in content["shards"])
        rows = tuple(map(row_from_json, content["rows"]))
        wrong = next((each for each in shards if not _is_shard(each)), None)
        wrong = wrong or next((row for row in rows if not _is_row(row, shards)), None)
        if wrong:
            raise ValueError(f"{type(wrong).__name__} {tuple(wrong)}")
        return Index(content["inputs"], shards, rows)
    except FileNotFoundError:
        unfinished = os.path.isdir(os.path.join(folder, PROGRESS))
        hint = "packing has not finished: run its command again" if unfinished else "--mode=records makes it"
        raise DataError(f"missing file {path}, the index of a packed data set; {hint}") from None
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged index of a packed data set: {error!r:.300}") from None


def _is_shard(shard: Shard) -> bool:
    """Whether the fields have their types, and the file is in the folder of the index."""
    return (
        type(shard.file) is str
        and os.path.basename(shard.file) == shard.file
        and all(type(number) is int and number >= 0 for number in (shard.records, shard.bytes))
    )


def _is_row(row: Row, shards: Sequence[Shard]) -> bool:
    """Whether the fields have their types and the records are in their shard."""
    numbers = (row.shard, row.position, row.image_bytes, row.mask_bytes, *row.size, *(row.mask_size or ()))
    return (
        type(row.image) is str
        and (row.mask is None) == (row.mask_size is None)
        and (row.mask is None or type(row.mask) is str)
        and all(type(number) is int and number >= 0 for number in numbers)
        and len(row.size) == len(row.mask_size or row.size) == 2
        and row.shard < len(shards)
        and row.position + (row.mask is not None) < shards[row.shard].records
    )


def index_to_json(index: Index) -> dict:
    """Returns the content of index.json for `read_index`."""
    return {"format": FORMAT, "columns": Row._fields, **index._asdict()}


def row_from_json(values: list) -> Row:
    """Returns a row of the index from its JSON list, in which sizes are lists."""
    *fields, size, mask_size = values
    return Row(*fields, tuple(size), tuple(mask_size) if mask_size else None)


def check_shards(folder: str, index: Index) -> None:
    """Raises DataError if a shard is missing or its size differs from the index."""
    for shard in index.shards:
        path = os.path.join(folder, shard.file)
        try:
            size = os.path.getsize(path)
        except OSError:
            raise DataError(f"missing file {path}, a shard of a packed data set (listed in {INDEX})") from None
        if size != shard.bytes:
            raise DataError(f"{path}: {size} bytes; expected {shard.bytes} ({INDEX}): copy or pack it again")
