"""Masks to class ids, with and without a label map."""

import pickle

import numpy as np
import pytest
from PIL import Image

from configs import defaults
from input_pipeline.decode import Encoded
from input_pipeline.errors import DataError
from input_pipeline.labels import Labels
from input_pipeline.sources.folder import FolderSource
from input_pipeline.split_lists import Entry
from tests.input_pipeline.test_decode import encoded, exif

CLASSES = ("road", "traffic light", "sky")


def mapped(tmp_path, text, name="map.txt"):
    (tmp_path / name).write_text(text)
    return Labels(CLASSES, label_map=str(tmp_path / name))


def ids(labels, values, mode=None):
    """Returns the class ids of a PNG of `values` as a list."""
    image = Image.fromarray(np.array(values, np.uint8)) if mode is None else Image.fromarray(np.array(values, mode))
    return labels.decode(encoded(image)).tolist()


def test_values_are_ids_without_a_map():
    labels = Labels(CLASSES, ignore=255, ignore_values=(7, 300))
    assert ids(labels, [[0, 1, 2, 255, 7]]) == [[0, 1, 2, 255, 255]]
    assert ids(labels, [[0, 2, 300]], np.uint16) == [[0, 2, 255]]
    with pytest.raises(
        DataError, match=r"a\.png: mask values 3, 9 found; .* 0\.\.2 \(3 classes\) or 255, 7, 300 \(ign"
    ):
        ids(labels, [[9, 1, 3]])
    raw = labels.raw(encoded(Image.fromarray(np.array([[9, 1, 3, 9]], np.uint8))))
    assert raw.tolist() == [[9, 1, 3, 9]] and labels.uncovered(raw) == [3, 9]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.txt", "# Cityscapes\n7 road\n\n8 1\n19 traffic light\n23 2\n0 ignore\n65535 255\n"),
        ("map.csv", "7,road\n8,1\n19,traffic light\n23,sky\n0,ignore\n65535,ignore\n"),
        ("map.csv", 'name,color,id\nroad,"1, 2",7\n1,x,8\ntraffic light,,19\nsky,,23\nignore,,0\nignore,,65535\n'),
        ("map.tsv", "\ufeff7\troad\n8\t1\n19\ttraffic light\n23\tsky\n0\tignore\n65535\tignore\n"),
        ("map.json", '{"7": "road", "8": 1, "19": "traffic light", "23": "sky", "0": "ignore", "65535": 255}'),
    ],
)
def test_ids_are_mapped(tmp_path, name, text):
    labels = pickle.loads(pickle.dumps(mapped(tmp_path, text, name)))
    assert ids(labels, [[7, 8, 19, 23, 0]]) == [[0, 1, 1, 2, 255]]
    assert ids(labels, [[7, 65535]], np.uint16) == [[0, 255]]
    with pytest.raises(DataError, match=r"mask values 1, 255 found; expected those of the label map .*map\."):
        ids(labels, [[7, 1, 255]])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.txt", "64 128 64\troad\n0 0 192\ttraffic light\n1 0 192\t2\n0\t0\t0\tignore\n"),
        ("map.csv", "name,r,g,b\nroad,64,128,64\ntraffic light,0,0,192\nsky,1,0,192\nignore,0,0,0\n"),
        ("map.json", '{"64 128 64": "road", "0, 0, 192": "traffic light", "1 0 192": 2, "0 0 0": "ignore"}'),
    ],
)
def test_colors_are_mapped_exactly(tmp_path, name, text):
    labels = mapped(tmp_path, text, name)
    assert labels.colors
    assert ids(labels, [[[64, 128, 64], [0, 0, 192], [1, 0, 192], [0, 0, 0]]]) == [[0, 1, 2, 255]]
    with pytest.raises(DataError, match=r"mask values \(63, 128, 64\), \(64, 129, 64\) found"):
        ids(labels, [[[64, 129, 64], [63, 128, 64]]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7 road\n8 raod\n", r"map\.txt:2: no class 'raod'; did you mean 'road'\?"),
        ("7 3\n", r"map\.txt:1: no class '3'.*an id below 3"),
        ("7 road\n7 sky\n", r"map\.txt:2: 7 has two classes"),
        ("7 road\n1 2 3 sky\n", r"map\.txt:2: the label map mixes ids and colors"),
        ("7\n", r"map\.txt:1: found '7'; expected `ID CLASS`"),
        ("road 7\n", r"map\.txt:1: found 'road'; expected an id, or red, green and blue"),
        ("65536 road\n", r"map\.txt:1: value 65536; expected 0\.\.65535"),
        ("0 0 256 road\n", r"map\.txt:1: value 256; expected 0\.\.255"),
        ("id,label\n7,road\n", r"map\.txt:1: found 'id, label'; expected .*names of columns"),
        ("id,class\n7,road,1\n", r"map\.txt:2: found 3 columns; expected 2: id, class"),
        ("# nothing\n", r"map\.txt: the label map is empty"),
        (f"{'7' * 5000} road\n", r"map\.txt:1: found '7777.*\[\.\.\.\].*expected `ID CLASS`"),
        (f"7 road\n{'7' * 5000} road\n", r"map\.txt:2: found '7777.*\[\.\.\.\].*expected an id"),
        (f"7 {'x' * 200_000}\n", r"map\.txt:1: no class 'x+\[\.\.\.\]x+'"),
        (f'7,"{"x" * 200_000}"\n', r"map\.txt:1: found '7,\"x+\[\.\.\.\].*', not CSV: field larger"),
        ("7 ro\0ad\n", r"map\.txt: cannot be read as a label map: line 1"),
        ("\u0667 road\n", r"map\.txt:1: found '\u0667, road'; expected `ID CLASS`"),
        ("7 \x1b[31mroad\n", r"map\.txt:1: no class '\\x1b\[31mroad'"),
    ],
)
def test_errors_in_a_map_are_reported(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        mapped(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"7":' * 100_000, "not JSON"),
        (f'{{"7": {"1" * 5000}}}', "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"x": "road"}', "key 'x': found 'x'; expected an id"),
        ('{"7": ["road"]}', "key '7': its value is neither text nor an integer"),
        ('{"7": true}', "key '7': its value is neither text nor an integer"),
        ('{"7": "road", "7": "sky"}', "key '7': 7 has two classes"),
    ],
)
def test_errors_in_json_are_reported(tmp_path, text, message):
    with pytest.raises(DataError, match=rf"map\.json: {message}"):
        mapped(tmp_path, text, "map.json")


@pytest.mark.parametrize("name", ["ignore", "2", "255"])
def test_names_of_classes_that_mean_something_else(tmp_path, name):
    (tmp_path / "map.txt").write_text(f"7 road\n8 {name}\n")
    with pytest.raises(DataError, match=rf"map\.txt:2: '{name}' is a class \(config\.data\.classes\) and also means"):
        Labels((name, "road", "sky"), label_map=str(tmp_path / "map.txt"))
    assert ids(Labels(("road", "sky", "ignore")), [[2, 255]]) == [[2, 255]]  # Without a map nothing is ambiguous.


def test_from_config(tmp_path):
    data = defaults.get_config().data
    data.update({"root": str(tmp_path), "classes": CLASSES, "label_map": "map.txt"})
    with pytest.raises(DataError, match=r"missing label map map\.txt"):
        Labels.from_config(data)
    (tmp_path / "map.txt").write_text("7 sky")
    assert ids(Labels.from_config(data), [[7]]) == [[2]]
    data.ignore_values = (1,)
    with pytest.raises(DataError, match=r"config\.data\.ignore_values is \(1,\).*lines `VALUE ignore`"):
        Labels.from_config(data)
    data.update({"label_map": "", "ignore_values": (-1,)})
    with pytest.raises(DataError, match=r"config\.data\.ignore_values has -1"):
        Labels.from_config(data)


def test_a_mask_that_fits_the_stored_image_is_explained(tmp_path):
    """As written by a program that ignores the orientation."""
    (tmp_path / "a.jpg").write_bytes(encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif(6)).content)
    for size, hint in (
        ((6, 4), r"\. The mask fits the image as stored, before its EXIF orientation \(6\)"),
        ((5, 4), "$"),
    ):
        Image.new("L", size).save(tmp_path / "a.png")
        source = FolderSource(str(tmp_path), [Entry("a.jpg", "a.png")], "list.txt", Labels(CLASSES))
        for read in (lambda source=source: source[0], source.check_headers):
            with pytest.raises(DataError, match=rf"a\.png: mask of {size[0]}x4 pixels; expected 4x6, .*a\.jpg{hint}"):
                read()
    Image.new("L", (4, 6)).save(tmp_path / "a.png")
    source = FolderSource(str(tmp_path), [Entry("a.jpg", "a.png")], "list.txt", Labels(CLASSES))
    assert source[0]["image"].shape == (6, 4, 3) and source[0]["label"].shape == source.size(0) == (6, 4)


def test_missing_mask_names_the_list(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    source = FolderSource(str(tmp_path), [Entry("a.png", "b.png")], "list.txt", Labels(CLASSES))
    with pytest.raises(DataError, match=r"missing file .*b\.png \(listed in list\.txt\)"):
        source.labels.decode(Encoded(str(tmp_path / "b.png"), "b.png", "list.txt"))
    with pytest.raises(DataError, match=r"missing file .*b\.png \(listed in list\.txt\)"):
        source[0]


def test_a_label_map_that_is_no_file_is_named_with_its_key(tmp_path, monkeypatch):
    """The home folder, which the value `~` does not name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    data = defaults.get_config().data
    data.update({"classes": CLASSES, "label_map": "~"})
    with pytest.raises(DataError, match=r"a folder; expected a file \(config.data.label_map\)"):
        Labels.from_config(data)
