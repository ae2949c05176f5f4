import io
import json

import numpy as np
import pytest
from PIL import Image

from configs import custom, shapes
from dssn_jax.prepare import check, check_report, pack
from dssn_jax.prepare import prepare as own_images
from dssn_jax.prepare.prepare import DefectsError
from input_pipeline.errors import DataError
from tests.input_pipeline.own_images import make_root, save_image, save_mask


@pytest.fixture
def sound(tmp_path):
    """A root without a defect, and its lists: 6 labeled, 3 unlabeled, 2 validation images; classes a, b, c."""
    masks = {f"x{n}": (n % 3,) for n in range(6)} | {"v0": (0, 1), "v1": (2,)}
    root = make_root(tmp_path / "root", masks, unlabeled=("u0", "u1", "u2"))
    write(root / "train.txt", [f"x{n}" for n in range(6)])
    write(root / "val.txt", ["v0", "v1"])
    return root


def write(path, names, extra=""):
    path.write_text("".join(f"images/{name}.png masks/{name}.png\n" for name in names) + extra)


def configure(root):
    return custom.get_config(f"root={root},labeled=train.txt,val=val.txt")


def findings(report):
    return {finding.kind: finding for finding in report.findings}


def test_sound_data(sound, capsys, tmp_path):
    save_mask(sound / "masks/x0.png", (0, 0, 0, 255))
    report = own_images.check(configure(sound), str(tmp_path / "report.json"))
    assert report.findings == () and report.defects == 0
    assert report.images == {"labeled": 6, "unlabeled": 3, "val": 2}
    # x0: six rows of 8 pixels are a, two are ignored; x3: all a; x1, x4: b; x2, x5: c. v0: half a, half b; v1: c.
    assert report.pixels["labeled"].tolist() == [48 + 64, 128, 128] and report.ignored["labeled"] == 16
    assert report.pixels["val"].tolist() == [32, 32, 64]
    assert report.occurrences["labeled"].tolist() == [2, 2, 2] and report.occurrences["val"].tolist() == [1, 1, 1]
    text = capsys.readouterr().out
    assert "nothing to fix" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("0 a"))
    assert row[2:] == ["30.43%", "2", "(33.33%)", "25.00%", "1", "(50.00%)"]
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["to_fix"] == 0 and saved["classes"]["b"]["val"] == {"pixels": 32, "images": 1}
    assert saved["sizes"]["unlabeled"] == {"smallest": "8x8", "median": "8x8", "largest": "8x8"}


def test_every_defect_is_told(sound, capsys):
    """One of each, in a single look."""
    png = (sound / "images/x0.png").read_bytes()
    (sound / "images/x0.png").write_bytes(png[: len(png) // 2])
    (sound / "images/x1.png").unlink()
    (sound / "masks/x2.png").write_bytes(b"<html>404</html>")
    save_mask(sound / "masks/x3.png", (0,), size=7)
    save_mask(sound / "masks/x4.png", (0, 7, 201))
    save_mask(sound / "masks/x5.png", (7,))
    (sound / "images/u0.png").write_bytes((sound / "unlabeled/u1.png").read_bytes())
    save_mask(sound / "masks/u0.png", (0,))
    (sound / "images/v1.png").write_bytes((sound / "images/x2.png").read_bytes())
    save_image(sound / "unlabeled/u2.png", 9, size=30)
    Image.open(sound / "unlabeled/u0.png").convert("L").save(sound / "unlabeled/u0.png")
    write(sound / "train.txt", ["x0", "x1", "x2", "x3", "x4", "x5", "u0", "u0", "v0"], "images/x9.png\n")
    with pytest.raises(DefectsError, match=f"the data of {sound}: 9 to fix"):
        own_images.check(configure(sound))
    report = check(configure(sound))
    found = {kind: (finding.level, "\n".join(finding.items)) for kind, finding in findings(report).items()}
    for kind, level, parts in (
        (
            "layout",
            "fix",
            ["train.txt:10: found 1 column", "1 labeled images are validation images too", "v0"],
        ),
        ("unreadable_images", "fix", ["images/x0.png: damaged", "missing file", "images/x1.png"]),
        ("unreadable_masks", "fix", ["masks/x2.png: not an image"]),
        ("size_mismatches", "fix", ["masks/x3.png: mask of 7x7 pixels; expected 8x8"]),
        ("uncovered_values", "fix", ["value 7: 2 masks: ", "x4.png", "x5.png", "value 201: 1 mask: "]),
        ("leaks", "fix", ["images/v1.png (val) = ", "images/x2.png (labeled)"]),
        ("duplicates", "note", ["images/u0.png (labeled) = ", "unlabeled/u1.png (unlabeled)"]),
        ("repeated", "note", ["images/u0.png: 2 times (labeled)"]),
        ("classes_not_in_labeled", "note", ["c"]),
        ("unlike_sizes", "note", ["unlabeled/u2.png: 30x30"]),
        ("unlike_colors", "note", ["unlabeled/u0.png"]),
    ):
        assert found[kind][0] == level
        for part in parts:
            assert part in found[kind][1], (kind, part, found[kind][1])
    assert set(found) == {
        "layout", "unreadable_images", "unreadable_masks", "size_mismatches", "uncovered_values", "leaks", "duplicates",
        "repeated", "classes_not_in_labeled", "unlike_sizes", "unlike_colors",
    }  # fmt: skip
    # x3 has no mask of its size, x4 and x5 no known values, x2 no mask; u0 counts twice, x0 and x1 by their masks.
    assert report.masks == {"labeled": 5, "val": 2}
    text = capsys.readouterr().out
    assert str(sound) not in text.partition("\nclass")[2]  # Names are those below the root.
    assert text.count("FIX") == 6 and "9 to fix" in text


def test_folders(tmp_path):
    """Images without masks, masks without images, images in two folders, classes that do not validate."""
    root = make_root(tmp_path, {"a": (0,), "b": (0,), "c": (255,), "d": (0,)}, images=("x",))
    save_mask(root / "masks/y.png", (0,))
    found = findings(check(custom.get_config(f"root={root},val=0.5")))
    assert "1 images in images have no mask: images/x.png" in found["layout"].items[0]
    assert found["unused_masks"].items == ("masks/y.png",)
    assert found["classes_not_in_labeled"].items == found["classes_not_in_val"].items == ("b", "c")
    assert found["empty_masks"].items == (str(root / "masks/c.png"),)
    assert found["labeled_in_unlabeled"].level == "note"


def test_packed_data(sound, tmp_path):
    """What was packed is looked through as the files are."""
    before = check(configure(sound))
    packed = pack(configure(sound), str(tmp_path / "packed"))
    config = configure(sound)
    config.data.update({"source": "array_record", "root": str(tmp_path / "packed"), "split": packed.split})
    after = check(config)
    assert after.images == before.images and after.sizes == before.sizes and after.findings == before.findings
    assert after.pixels["labeled"].tolist() == before.pixels["labeled"].tolist()


def test_items_are_counted_not_all_printed(sound):
    for n in range(6):
        (sound / f"images/x{n}.png").unlink()
    report = check(configure(sound))
    text = check_report.text(report)
    assert text.count("missing file") == 5 and "... 1 more" in text and "6 to fix" in text
    assert len(check_report.as_json(report)["findings"][0]["items"]) == 6


def test_names_that_a_terminal_cannot_show(sound):
    (sound / "unlabeled/\udcff.png").write_bytes(b"")
    text = check_report.text(check(configure(sound)))
    text.encode()
    assert r"\xff.png: " in text


def test_large_images(tmp_path):
    root = make_root(tmp_path, {"a": (0,), "b": (0,)})
    for name in "ab":
        Image.new("RGB", (3000, 4)).save(root / f"images/{name}.png")
        Image.fromarray(np.zeros((4, 3000), np.uint8)).save(root / f"masks/{name}.png")
    assert findings(check(custom.get_config(f"root={root}")))["large"].items[0].endswith("3000 pixels")


def test_nothing_to_check(tmp_path):
    with pytest.raises(DataError, match="generated images"):
        check(shapes.get_config())
    root = make_root(tmp_path, {"a": (0,), "b": (0,)})
    with pytest.raises(DataError, match="no such folder"):
        check(custom.get_config(f"root={root},masks=absent"))


def test_exif_and_color_maps_are_looked_through(tmp_path):
    """What training reads is what is checked: turned images, masks of colors."""
    root = make_root(tmp_path, {"a": (0,), "b": (0,)})
    image, exif = Image.new("RGB", (4, 8), (9, 9, 9)), Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    (root / "images/a.png").unlink()
    (root / "images/a.jpg").write_bytes(buffer.getvalue())
    colors = np.zeros((4, 8, 3), np.uint8)
    colors[:, 4:] = (255, 0, 0)
    Image.fromarray(colors).save(root / "masks/a.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / "masks/b.png")
    (root / "map.txt").write_text("0 0 0 a\n255 0 0 b\n")
    report = check(custom.get_config(f"root={root},label_map=map.txt"))
    assert not report.defects
    assert (report.pixels["labeled"] + report.pixels["val"]).tolist() == [16 + 64, 16, 0]
