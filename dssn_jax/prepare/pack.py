"""Packs the files of a data set into ArrayRecord shards: `--mode=records`. `input_pipeline.sources.records` reads them.

Packing that was stopped continues when the same command is run again and keeps the complete shards. The result is the
same, byte for byte, as if it had never been stopped.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from dssn_jax.workdir import files
from input_pipeline import decode, split_lists
from input_pipeline.decode import Encoded
from input_pipeline.errors import DataError
from input_pipeline.sources import records
from input_pipeline.sources.open import Sources, open_sources
from input_pipeline.sources.records import Index, Row, Shard

SHARD_BYTES = 128 << 20  # Many shards per data set, so that all cores pack; few enough for any file system.
# Images are compressed already, and are read individually.
_WRITER = "group_size:1,uncompressed"
_PLAN = "plan.json"
_SPLIT, _SPLITS = "all", "splits"  # For configurations without a split.
_CLASSES = "classes.txt"  # Where configs/custom.py looks for the names.


class PackResult(NamedTuple):
    """A packed data set."""

    index: Index
    split: str  # Name of the split whose lists are in the folder.
    kept: int  # Shards that existed already.
    without_mask: int  # Images whose mask is named only in the list of unlabeled images and does not exist.


class Item(NamedTuple):
    """An image file and its mask file, None if it has none; they become one or two records."""

    image: str
    mask: str | None
    image_path: str
    mask_path: str | None
    bytes: int  # Size of both files.


class ShardResult(NamedTuple):
    """The entries of the index for a shard."""

    shard: Shard
    rows: list[Row]


def pack_files(config, to: str, shard_bytes: int = SHARD_BYTES) -> PackResult:
    """Packs the labeled, unlabeled and validation images of `config` and their masks into the folder `to`.

    Each image is packed once, whichever lists name it, with its mask if any list names one. The lists (of all splits in
    the folder of splits), the class names and the label map are written to the same folder. Shows a progress bar.

    Args:
      config: the whole configuration; its data source is "folder".
      to: folder that does not exist, is empty, or was written by the same command.
      shard_bytes: a shard ends with the record that reaches this size.

    Raises:
      DataError: unusable data, before anything is written; or a folder with other content.
    """
    data, folder = config.data, pathlib.Path(to)
    if data.source != "folder":
        raise DataError(f"config.data.source is {data.source!r}; expected 'folder': only files can be packed")
    for key in ("splits", "label_map"):
        if os.path.normpath(data[key]).startswith(os.pardir):
            raise DataError(
                f"config.data.{key} is {data[key]!r}, outside of config.data.root and of {to}, which gets a copy; "
                "expected an absolute path, or one without '..'"
            )
    sources = open_sources(config)
    items = _items(sources, data.threads)
    described = json.dumps([(item.image, item.mask, item.bytes) for item in items])
    inputs = hashlib.sha256(described.encode()).hexdigest()
    plan = _plan(items, shard_bytes)
    done = _open_folder(folder, {"inputs": inputs, "shards": len(plan)})
    with tqdm(
        total=sum(item.bytes for item in items), unit="B", unit_scale=True, file=sys.stdout, mininterval=1
    ) as bar:
        packer = _Packer(folder, done, len(plan), bar.update)
        with ThreadPoolExecutor(min(data.threads, len(plan)), thread_name_prefix="pack") as pool:
            futures = [pool.submit(packer, number, shard) for number, shard in enumerate(plan)]
            try:
                results = [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()  # After an error, no further shard is started.
    split = _write_lists(data, sources, folder)
    rows = tuple(row for result in results for row in result.rows)
    index = Index(inputs, tuple(result.shard for result in results), rows)
    _write_json(folder / records.INDEX, records.index_to_json(index))
    shutil.rmtree(folder / records.PROGRESS)
    without = {entry.image for entry in sources.unlabeled.entries if entry.mask is not None}
    return PackResult(index, split, packer.kept, sum(item.mask is None and item.image in without for item in items))


def _items(sources: Sources, threads: int) -> list[Item]:
    """Returns each image once, in the order of the lists; raises DataError if lists disagree about its mask."""
    masks: dict[str, str | None] = {}
    for source in sources:
        for image, mask in source.entries:
            known = masks.setdefault(image, mask)
            if known is None:
                masks[image] = mask
            elif mask not in (None, known):
                raise DataError(
                    f"{image} has the mask {mask} in {source.where}, but {known} elsewhere; a packed image has one mask"
                )
    needed = {entry.mask for source in (sources.labeled, sources.val) for entry in source.entries}
    root = sources.labeled.root

    def item(image: str, mask: str | None) -> Item:
        image_path, mask_path = os.path.join(root, image), None if mask is None else os.path.join(root, mask)
        # Masks of unlabeled images are never read, so lists may name masks that do not exist.
        if mask is not None and mask not in needed and not os.path.isfile(mask_path):
            mask = mask_path = None
        return Item(
            image, mask, image_path, mask_path, sum(map(os.path.getsize, filter(None, (image_path, mask_path))))
        )

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(item, masks.keys(), masks.values()))


def _plan(items: Sequence[Item], shard_bytes: int) -> list[list[Item]]:
    """Divides items, in their order, into shards of at least `shard_bytes`, except the last one."""
    shards, size = [], shard_bytes
    for item in items:
        if size >= shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.bytes
    return shards


def _open_folder(folder: pathlib.Path, plan: dict) -> dict[int, ShardResult]:
    """Creates the folder, and returns the shards already completed by an earlier run of the same command.

    Raises:
      DataError: the folder has other content.
    """
    progress, done = folder / records.PROGRESS, {}
    if (folder / records.INDEX).exists():
        index = records.read_index(str(folder))
        existing = {"inputs": index.inputs, "shards": len(index.shards)}
        done = {number: ShardResult(shard, []) for number, shard in enumerate(index.shards)}
        for row in index.rows:
            done[row.shard].rows.append(row)
    elif (progress / _PLAN).exists():
        existing = json.loads((progress / _PLAN).read_text(errors="replace"))
        for note in progress.glob("[0-9]*.json"):
            with contextlib.suppress(ValueError, TypeError, KeyError):  # A damaged note: its shard is packed again.
                shard, rows = json.loads(note.read_text())
                done[int(note.stem)] = ShardResult(Shard(*shard), [records.row_from_json(row) for row in rows])
    elif folder.exists() and any(path != progress for path in folder.iterdir()):
        raise DataError(f"{folder}: neither empty nor a packed data set; expected a new folder")
    else:
        existing = plan
    if existing != plan:
        raise DataError(
            f"{folder}: holds a packed data set, complete or not, of other files or lists; expected a new folder"
        )
    progress.mkdir(parents=True, exist_ok=True)
    for part in folder.glob(f".{'[0-9a-f]' * 32}.part"):  # Left by an `atomic_write` that was killed.
        part.unlink()
    _write_json(progress / _PLAN, plan)
    return done


class _Packer:
    """Packs shards, each completely or not at all; keeps those that are complete already.

    Attributes:
      kept: number of shards that were kept.
    """

    def __init__(
        self, folder: pathlib.Path, done: dict[int, ShardResult], shards: int, progress: Callable[[int], None]
    ):
        self._folder, self._done, self._shards = folder, done, shards
        self._progress, self._lock, self.kept = progress, threading.Lock(), 0

    def __call__(self, number: int, items: Sequence[Item]) -> ShardResult:
        """Packs `items` into shard `number`."""
        if number in self._done and self._is_complete(self._done[number].shard):
            self._advance(sum(item.bytes for item in items), kept=1)
            return self._done[number]
        path = self._folder / f"records-{number:05d}-of-{self._shards:05d}.array_record"
        with files.atomic_write(path) as part:
            rows = self._write(number, part, items)
            count = sum(1 if row.mask is None else 2 for row in rows)
            shard = Shard(path.name, count, part.stat().st_size, _sha256(part))
        _write_json(self._folder / records.PROGRESS / f"{number:05d}.json", [shard, rows])
        return ShardResult(shard, rows)

    def _is_complete(self, shard: Shard) -> bool:
        path = self._folder / shard.file
        return path.is_file() and path.stat().st_size == shard.bytes and _sha256(path) == shard.sha256

    def _write(self, number: int, part: pathlib.Path, items: Sequence[Item]) -> list[Row]:
        writer, rows, position = ArrayRecordWriter(str(part), _WRITER), [], 0
        try:
            for item in items:
                paths = [path for path in (item.image_path, item.mask_path) if path is not None]
                contents = [decode.read(Encoded(path, path)) for path in paths]
                if sum(map(len, contents)) != item.bytes:
                    raise DataError(f"{item.image_path}, or its mask, changed while it was packed")
                sizes = [decode.size(Encoded(*file)) for file in zip(contents, paths, strict=True)]
                for content in contents:
                    writer.write(content)
                lengths = [*map(len, contents), 0]
                rows.append(Row(item.image, item.mask, number, position, *lengths[:2], *[*sizes, None][:2]))
                position += len(contents)
                self._advance(item.bytes)
        finally:
            writer.close()
        return rows

    def _advance(self, packed: int, kept: int = 0) -> None:
        with self._lock:
            self.kept += kept
            self._progress(packed)


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # Shards that count as complete must survive a crash of the machine.
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_lists(data, sources: Sources, folder: pathlib.Path) -> str:
    """Writes the lists, the label map and the class names; returns the name of the split."""
    root = pathlib.Path(sources.labeled.root)
    splits = folder / (_SPLITS if os.path.isabs(os.path.expanduser(data.splits)) else data.splits)
    texts = {folder / _CLASSES: "".join(f"{name}\n" for name in data.classes).encode()}
    if data.label_map and not os.path.isabs(data.label_map) and (root / data.label_map).is_file():
        texts[folder / data.label_map] = (root / data.label_map).read_bytes()
    if data.split:
        original = pathlib.Path(split_lists.find_split(str(root), data.splits, data.split).val).parent
        names = [original / split_lists.VAL]
        names += [path for list_ in split_lists.SPLIT_LISTS for path in original.glob(f"*/{list_}")]
        texts |= {splits / path.relative_to(original): path.read_bytes() for path in names}
    else:
        paths = [*(splits / _SPLIT / list_ for list_ in split_lists.SPLIT_LISTS), splits / split_lists.VAL]
        for path, source in zip(paths, sources, strict=True):
            texts[path] = split_lists.format_list(source.entries).encode()
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(path) as part:
            part.write_bytes(text)
    return data.split or _SPLIT


def _write_json(path: pathlib.Path, content) -> None:
    with files.atomic_write(path) as part:
        part.write_text(json.dumps(content) + "\n")
