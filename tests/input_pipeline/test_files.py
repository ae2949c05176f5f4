"""Only regular files of bounded size are opened, and texts are UTF-8."""

import pytest

from input_pipeline.class_names import read_class_names
from input_pipeline.errors import DataError
from input_pipeline.files import open_regular, read_text
from input_pipeline.labels import read_label_map
from input_pipeline.sources.images import find_images
from input_pipeline.sources.open import open_sources
from input_pipeline.sources.records import INDEX, read_index
from tests.input_pipeline.special_files import SPECIAL, make_special


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["images/1.png", "masks/1.png", "masks/11.png", "splits/small/labeled.txt"])
def test_special_files_are_named(folder, config, name, kind):
    """Opening a pipe would wait for a writer, and reading a device would not end."""
    make_special(folder / name, kind)
    problem = SPECIAL[kind]
    if name.endswith(".txt"):
        problem = "missing list"
    with pytest.raises(DataError) as error:
        open_sources(config)
    assert str(folder / name) in str(error.value) and problem in str(error.value)


READERS = {
    "classes.txt": read_class_names,
    "map.txt": lambda path: read_label_map(path, ("a", "b"), 255),
    "map.json": lambda path: read_label_map(path, ("a", "b"), 255),
    INDEX: lambda path: read_index(path.removesuffix(INDEX)),
    "list.txt": find_images,
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", READERS)
def test_special_texts_are_named(tmp_path, name, kind):
    path = tmp_path / name
    make_special(path, kind)
    with pytest.raises(DataError) as error:
        READERS[name](str(path))
    message = str(error.value)
    assert str(path) in message or str(tmp_path) in message
    assert SPECIAL[kind].split(";")[0] in message or "no such file" in message or "no image in this folder" in message


def test_a_pipe_to_predict_is_named(tmp_path):
    make_special(tmp_path / "a.png", "pipe")
    (tmp_path / "list.txt").write_text("a.png\n")
    for path in (tmp_path / "a.png", tmp_path, tmp_path / "list.txt"):
        source, _ = find_images(str(path))
        assert [str(error) for error in source.errors] == [f"{tmp_path}/a.png: a named pipe; expected a file"]


def test_huge_files_are_refused(tmp_path):
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"huge\.png: a file of 1099511627776 bytes; expected at most"):
        open_regular(str(tmp_path / "huge.png"))


@pytest.mark.parametrize(
    ("content", "line"),
    [(b"a\nb\xff\n", 2), (b"a\r\n\r\nb\x00c", 3), ("caf\u00e9".encode("latin-1"), 1), ("a\n".encode("utf-16"), 1)],
)
def test_bytes_that_are_no_text_are_named(tmp_path, content, line):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=rf"list\.txt: cannot be read as a text list: line {line} has bytes that are no"
    ):
        read_text(str(path), "a text list")


def test_line_ends_and_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_text(str(tmp_path / "a.txt"), "text") == "a\nb\nc\n"
    with pytest.raises(DataError, match="NUL"):
        read_text(str(tmp_path / "a\0.txt"), "text")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("".join(f"class {i}\n" for i in range(100_000)), "100000 names; .*: 2 to 255 names"),
        ("a\n\x1b[31mred\n", r"classes\.txt:2: '\\x1b\[31mred' has control characters"),
        ("a\nb\u2028c\n", r"classes\.txt:2: 'b\\u2028c' has control characters"),
        ("", "0 names"),
    ],
)
def test_odd_class_names(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_class_names(str(tmp_path / "classes.txt"))


def test_class_names_with_markup_or_of_metrics_are_names(tmp_path):
    names = ("mean", "miou", "<b>road</b>", "ignore", "1", "\u9053\u8def", "traffic light")
    (tmp_path / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    assert read_class_names(str(tmp_path / "classes.txt")) == names
