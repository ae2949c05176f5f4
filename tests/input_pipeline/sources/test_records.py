"""Packed data sets: the records of the files, also after interrupted packing; damage is reported."""

import hashlib
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from configs.checks import inexact_changes
from dssn_jax.prepare.pack import pack_files
from input_pipeline.errors import DataError
from input_pipeline.sources.open import digest, open_source, open_sources
from tests.input_pipeline.conftest import write_list

ROOT = pathlib.Path(__file__).parents[3]
SHARD_BYTES = 300  # A few of the small images.

# Packs in another process, which kills itself (SIGKILL) when it reads header number argv[3].
KILLED = """
import itertools, os, pickle, signal, sys
from absl import flags
from input_pipeline import decode
from dssn_jax.prepare.pack import pack_files

config = pickle.load(open(sys.argv[1], "rb"))
headers, original = itertools.count(), decode.size
def size(file):
    if next(headers) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(file)
decode.size = size
pack_files(config, sys.argv[2], int(sys.argv[4]))
"""


@pytest.fixture
def packed(folder, config, tmp_path):
    """Returns the configuration of a packed copy of `folder`."""
    pack_files(config, str(tmp_path / "packed"), SHARD_BYTES)
    copy = config.copy_and_resolve_references()
    copy.data.source, copy.data.root = "array_record", str(tmp_path / "packed")
    return copy


def sums(folder):
    """Returns the SHA-256 of each file below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def shards(config):
    return sorted(pathlib.Path(config.data.root).glob("*.array_record"))


def test_same_records_as_the_files(config, packed):
    files, records = open_sources(config), pickle.loads(pickle.dumps(open_sources(packed)))
    assert len(shards(packed)) > 2
    for expected, source in zip(files, records, strict=True):
        assert digest(expected) == digest(source) and len(expected) == len(source)
        assert [expected.size(i) for i in range(len(expected))] == [source.size(i) for i in range(len(source))]
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(source.__getitem__, [*range(len(source))] * 20))
        for i, record in enumerate(read):
            assert set(record) == set(expected[0])
            for key, values in expected[i % len(source)].items():
                np.testing.assert_array_equal(record[key], values)


def test_open_source(config, packed):
    (pathlib.Path(packed.data.root) / "splits/small/labeled.txt").unlink()
    (pathlib.Path(packed.data.root) / "splits/small/unlabeled.txt").unlink()
    assert digest(open_source(packed, "val")) == digest(open_sources(config).val)


def test_each_image_once_with_its_bytes(folder, packed):
    """Read independently of the source: the index locates the bytes of a file."""
    from array_record.python.array_record_module import ArrayRecordReader

    root = pathlib.Path(packed.data.root)
    index = json.loads((root / "index.json").read_text())
    rows = [dict(zip(index["columns"], row, strict=True)) for row in index["rows"]]
    assert sorted(row["image"] for row in rows) == sorted(f"images/{i}.png" for i in range(12))
    for name, _, size, sha256 in index["shards"]:
        content = (root / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size, sha256)
    for row in rows:
        reader = ArrayRecordReader(str(root / index["shards"][row["shard"]][0]))
        image, mask = reader.read([row["position"], row["position"] + 1])
        assert image == (folder / row["image"]).read_bytes() and mask == (folder / row["mask"]).read_bytes()
        assert row["size"] == row["mask_size"] == [16, 16]
        assert (row["image_bytes"], row["mask_bytes"]) == (len(image), len(mask))


@pytest.mark.slow
def test_interrupted_packing_gives_the_same_files(folder, config, packed, tmp_path):
    undisturbed, target = pathlib.Path(packed.data.root), tmp_path / "target"
    config.data.threads = 1  # So that some shards are complete when the process ends.
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    for headers in (9, 7):
        command = [sys.executable, "-c", KILLED, tmp_path / "config", target, headers, SHARD_BYTES]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert not (target / "index.json").exists() and list(target.glob(".*.part"))
    complete = {path: path.stat().st_mtime_ns for path in target.glob("*.array_record")}
    assert 2 <= len(complete) < len(list(undisturbed.glob("*.array_record")))
    packed.data.root = str(target)
    with pytest.raises(DataError, match=r"missing file .*packing has not finished: run its command again"):
        open_sources(packed)
    assert pack_files(config, str(target), SHARD_BYTES).kept == len(complete)
    assert {path: path.stat().st_mtime_ns for path in complete} == complete
    assert sums(target) == sums(undisturbed)


def test_packing_again_repairs(config, packed):
    folder = pathlib.Path(packed.data.root)
    before = sums(folder)
    flip(shards(packed)[1])
    shards(packed)[2].unlink()
    assert pack_files(config, str(folder), SHARD_BYTES).kept == len(shards(packed)) - 2
    assert sums(folder) == before


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) - 40] ^= 1  # In the last record.
    path.write_bytes(content)


def test_damaged_shards_are_named(packed):
    shard = shards(packed)[0]
    content = shard.read_bytes()
    # ArrayRecord pads to blocks of 64 KiB and ends with an index: the first record is near the start.
    start = content.index(b"\x89PNG")
    shard.write_bytes(content[: start + 30] + bytes([content[start + 30] ^ 1]) + content[start + 31 :])
    with pytest.raises(DataError, match=rf"{shard}: damaged, record 0 \(images/0\.png\) cannot be read"):
        open_sources(packed).labeled[0]
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"{shard}: {len(content) - 1} bytes; expected {len(content)}"):
        open_sources(packed)
    shard.unlink()
    with pytest.raises(DataError, match=rf"missing file {shard}, a shard"):
        open_sources(packed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"missing file .*index\.json.*--mode=records makes it"),
        ("{", r"index\.json: damaged index"),
        ('{"format": "dssn_jax records 1"}', r"index\.json: damaged index"),
        ("[" * 100_000, r"index\.json: damaged index"),
        ('{"format": "other"}', r"index\.json: format 'other'; expected 'dssn_jax records 1'"),
    ],
)
def test_unreadable_index_is_reported(packed, content, message):
    path = pathlib.Path(packed.data.root) / "index.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        open_sources(packed)


@pytest.mark.parametrize("value", [None, -1, 1.5, "x", [], True, 1 << 70, "../records"])
@pytest.mark.parametrize(("table", "column"), [("shards", 0), *(("rows", column) for column in (0, 2, 3, 6, 7))])
def test_odd_values_in_the_index_are_reported(packed, table, column, value):
    path = pathlib.Path(packed.data.root) / "index.json"
    content = json.loads(path.read_text())
    if (table, column, type(value)) == ("rows", 0, str):  # Any name.
        return
    content[table][0][column] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"index\.json: damaged index|missing file .*x, a shard"):
        open_sources(packed)


def test_lists_of_images_that_were_not_packed(packed):
    path = pathlib.Path(packed.data.root) / "splits/small/labeled.txt"
    path.write_text("images/0.png masks/0.png\nimages/99.png masks/99.png\nimages/1.png masks/2.png\n")
    with pytest.raises(DataError, match=r"labeled\.txt: 2 images or masks are not in .*: images/99\.png, masks/2\.png"):
        open_sources(packed)


def test_other_splits_are_packed_too(folder, config, tmp_path):
    os.makedirs(folder / "splits/other")
    write_list(folder / "splits/other/labeled.txt", (7, 3))
    (folder / "splits/other/unlabeled.txt").write_text("images/5.png\n")
    (folder / "map.txt").write_text("0 c\n1 b\n2 a\n")
    config.data.label_map = "map.txt"
    pack_files(config, str(tmp_path / "packed"))
    (folder / "map.txt").unlink()  # The packed data set is self-contained.
    config.data.update({"source": "array_record", "root": str(tmp_path / "packed"), "split": "other"})
    sources = open_sources(config)
    assert [source.name(0) for source in sources] == ["images/7.png", "images/5.png", "images/10.png"]
    assert sources.labeled[0]["label"][0, 0] == 1 and sources.labeled[1]["label"][0, 0] == 2
    assert (tmp_path / "packed/classes.txt").read_text() == "a\nb\nc\n"


def test_sizes_are_compared_without_reading(folder, config, packed):
    """A mask that is a label only in another split was packed at any size."""
    Image.new("L", (16, 15)).save(folder / "masks/7.png")
    target = f"{packed.data.root}2"
    pack_files(config, target)
    packed.data.root = target
    (pathlib.Path(target) / "splits/small/labeled.txt").write_text("images/7.png masks/7.png\n")
    with pytest.raises(DataError, match=r"masks/7\.png in .*array_record: mask of 16x15 pixels; expected 16x16"):
        open_sources(packed)


def test_folders_with_other_content_are_refused(folder, config, packed, tmp_path):
    os.makedirs(tmp_path / "mine")
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"mine: neither empty nor a packed data set"):
        pack_files(config, str(tmp_path / "mine"))
    write_list(folder / "splits/val.txt", (11,))
    with pytest.raises(DataError, match=r"packed: holds a packed data set, complete or not, of other files or lists"):
        pack_files(config, packed.data.root, SHARD_BYTES)
    config.data.source = "array_record"
    with pytest.raises(DataError, match="expected 'folder': only files can be packed"):
        pack_files(config, str(tmp_path / "new"))


def test_bad_data_is_reported_before_anything_is_written(folder, config, tmp_path):
    (folder / "masks/11.png").unlink()
    with pytest.raises(DataError, match=r"missing file .*masks/11\.png"):
        pack_files(config, str(tmp_path / "packed"))
    assert not (tmp_path / "packed").exists()


def test_masks_of_unlabeled_images_may_lack_or_disagree(folder, config, tmp_path):
    (folder / "masks/7.png").unlink()
    assert pack_files(config, str(tmp_path / "packed")).without_mask == 1
    with open(folder / "splits/small/unlabeled.txt", "a") as file:
        file.write("images/0.png masks/4.png\n")
    with pytest.raises(
        DataError, match=r"images/0\.png has the mask masks/4\.png in .*unlabeled\.txt, but masks/0\.png"
    ):
        pack_files(config, str(tmp_path / "again"))


def test_own_folders_become_lists(folder, config, tmp_path):
    """Also with spaces in names; without lists the split is called "all"."""
    (folder / "images/0.png").rename(folder / "images/a b.png")
    (folder / "masks/0.png").rename(folder / "masks/a b.png")
    config.data.split = ""
    config.data.folders.update({"labeled": "images", "val": "0.25"})
    files = open_sources(config)
    assert pack_files(config, str(tmp_path / "packed")).split == "all"
    config.data.update({"source": "array_record", "root": str(tmp_path / "packed"), "split": "all"})
    records = open_sources(config)
    assert [digest(source) for source in records] == [digest(source) for source in files]
    assert len(records.val) == 3 and "images/a b.png" in {
        source.name(i) for source in records for i in range(len(source))
    }


def test_a_run_may_continue_from_files_to_records(config, packed):
    assert inexact_changes(config.to_dict(), packed.to_dict()) == []
    packed.data.label_map = "other.txt"
    assert inexact_changes(config.to_dict(), packed.to_dict()) == ["config.data.label_map: '', now 'other.txt'"]


@pytest.mark.parametrize("key", ["label_map", "splits"])
def test_nothing_is_written_beside_the_folder(key, folder, config, tmp_path):
    (folder.parent / "x").mkdir()
    config.data[key] = f"../x/{key}"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=rf"config\.data\.{key} is '\.\./x/{key}', outside of config\.data\.root"):
        pack_files(config, str(tmp_path / "packed"))
    assert sorted(tmp_path.rglob("*")) == before
