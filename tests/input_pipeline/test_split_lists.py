"""Split lists: their lines, and the folder that they are looked up in."""

import pytest

from input_pipeline.errors import DataError
from input_pipeline.sources.open import open_sources
from input_pipeline.split_lists import Entry, find_split, format_entry, read_list


def _write(tmp_path, text):
    path = tmp_path / "list.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_read_list_pairs(tmp_path):
    path = _write(tmp_path, b"\xef\xbb\xbfa.jpg m/a.png\r\n\r\n  b.jpg\tm/b.png  \n")
    assert read_list(path, labeled=True) == [Entry("a.jpg", "m/a.png"), Entry("b.jpg", "m/b.png")]


def test_read_list_image_only_where_unlabeled(tmp_path):
    path = _write(tmp_path, "a.jpg\nb.jpg m/b.png\n")
    assert read_list(path, labeled=False) == [Entry("a.jpg", None), Entry("b.jpg", "m/b.png")]
    with pytest.raises(DataError, match=r"list\.txt:1: found 1 column, 'a\.jpg'; expected `image mask`$"):
        read_list(path, labeled=True)


@pytest.mark.parametrize("labeled", [True, False])
def test_read_list_three_columns(tmp_path, labeled):
    path = _write(tmp_path, "a.jpg a.png\n\nmy image.jpg b.png\n")
    with pytest.raises(DataError, match=r"list\.txt:3: found 3 columns, 'my image\.jpg b\.png'.*spaces"):
        read_list(path, labeled)


def test_names_in_a_line_with_a_tab_may_contain_spaces(tmp_path):
    entries = [Entry("my image.jpg", "b.png"), Entry("a.jpg", "b.png"), Entry("other image.jpg", None)]
    path = _write(tmp_path, "".join(f"{format_entry(entry)}\n" for entry in entries))
    assert read_list(path, labeled=False) == entries
    assert format_entry(entries[1]) == "a.jpg b.png"  # As the original writes it.


@pytest.mark.parametrize("name", ["a\tb.jpg", "a\nb.jpg", " a.jpg", "\udcff.jpg", ""])
def test_names_that_a_line_cannot_hold(name):
    with pytest.raises(DataError, match="a name that a list cannot hold"):
        format_entry(Entry(name, "b.png"))


def test_read_list_bad_files(tmp_path):
    with pytest.raises(DataError, match="the list is empty"):
        read_list(_write(tmp_path, "\n  \n"), labeled=True)
    with pytest.raises(DataError, match="missing list .*absent"):
        read_list(str(tmp_path / "absent.txt"), labeled=True)
    with pytest.raises(DataError, match=r"list\.txt: cannot be read as a text list"):
        read_list(_write(tmp_path, b"\xff\xd8\xff\xe0"), labeled=True)


def _make_split(folder, name):
    (folder / name).mkdir(parents=True)
    for part in (f"{name}/labeled.txt", f"{name}/unlabeled.txt", "val.txt"):
        (folder / part).write_text("a.jpg a.png\n")


def test_find_split_under_root_absolute_and_current(tmp_path, monkeypatch):
    _make_split(tmp_path / "root" / "splits", "1_8")
    _make_split(tmp_path / "here" / "lists", "1_4")
    monkeypatch.chdir(tmp_path / "here")
    root = str(tmp_path / "root")
    in_root = tmp_path / "root" / "splits"
    expected = tuple(str(in_root / part) for part in ("1_8/labeled.txt", "1_8/unlabeled.txt", "val.txt"))
    assert find_split(root, "splits", "1_8") == expected
    assert find_split("elsewhere", str(in_root), "1_8") == expected
    assert find_split(root, "lists", "1_4").val == str(tmp_path / "here" / "lists" / "val.txt")


def test_find_split_names_nearest_and_all(tmp_path):
    for name in ("1_8", "1_16", "full"):
        _make_split(tmp_path / "splits", name)
    with pytest.raises(DataError, match=r"no split '1_6' .*did you mean '1_16'.*; splits there: 1_16, 1_8, full"):
        find_split(str(tmp_path), "splits", "1_6")
    with pytest.raises(DataError, match=r"config\.data\.split is not set.*splits there: 1_16, 1_8, full"):
        find_split(str(tmp_path), "splits", "")
    with pytest.raises(DataError, match=r"no folder of split lists: tried .*/absent and .*/absent"):
        find_split(str(tmp_path), "absent", "1_8")


def test_find_split_missing_list(tmp_path):
    _make_split(tmp_path / "splits", "1_8")
    (tmp_path / "splits" / "val.txt").unlink()
    with pytest.raises(DataError, match=r"missing list .*splits/val\.txt"):
        find_split(str(tmp_path), "splits", "1_8")


def test_find_split_for_val_alone(tmp_path):
    _make_split(tmp_path / "with", "1_8")
    assert find_split("", str(tmp_path / "with"), "1_8", ("val",)).val == str(tmp_path / "with/val.txt")
    (tmp_path / "val_only").mkdir()
    (tmp_path / "val_only/val.txt").write_text("a.jpg a.png\n")
    for split in ("1_8", ""):
        assert find_split("", str(tmp_path / "val_only"), split, ("val",)).val == str(tmp_path / "val_only/val.txt")
        with pytest.raises(DataError, match=r"no split.*splits there: none"):
            find_split("", str(tmp_path / "val_only"), split)


def test_a_tab_at_the_end_of_a_line_separates_nothing(tmp_path):
    path = _write(tmp_path, "a.jpg a.png\t\nmy image.jpg\tb.png\t\n\ta.jpg a.png\n")
    assert read_list(path, labeled=True) == [
        Entry("a.jpg", "a.png"), Entry("my image.jpg", "b.png"), Entry("a.jpg", "a.png"),
    ]  # fmt: skip


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("name", ["..", ".", "images/..", "images/", "/", "../../", "a\x1b[2J.png", "a\x85.png\tb.png"])
def test_what_is_no_path_of_a_file_is_named(tmp_path, name, labeled):
    path = _write(tmp_path, f"a.jpg a.png\n{name}\tmasks/a.png\n")
    with pytest.raises(DataError, match=r"list\.txt:2: '.*' (is a folder|has control characters); expected the path"):
        read_list(path, labeled)


@pytest.mark.parametrize("absolute", [True, False])
def test_files_outside_the_root_may_be_listed(folder, config, absolute):
    """Lists are the user's own; which folder a file is in does not matter."""
    elsewhere = folder.parent / "elsewhere"
    (folder / "images").rename(elsewhere)
    prefix = str(elsewhere) if absolute else "../elsewhere"
    for name in ("small/labeled.txt", "small/unlabeled.txt", "val.txt"):
        path = folder / "splits" / name
        path.write_text(path.read_text().replace("images", prefix))
    sources = open_sources(config)
    assert [source[0]["image"][0, 0, 0] for source in sources] == [0, 0, 10]
