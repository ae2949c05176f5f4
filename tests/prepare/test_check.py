import io
import json

import numpy as np
import pytest
from PIL import Image

from configs import custom, shapes
from configs.checks import ConfigError
from dssn_jax.prepare import check_report, prepare
from dssn_jax.prepare.check import KINDS, check_data
from dssn_jax.prepare.pack import pack_files
from input_pipeline.errors import DataError
from tests.input_pipeline.own_images import make_root, save_image, save_mask


@pytest.fixture
def sound(tmp_path):
    """Returns a root without a defect, with lists: 6 labeled, 3 unlabeled, 2 validation images; classes a, b, c."""
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
    report = prepare.check(configure(sound), to=str(tmp_path / "report.json"))
    assert report.findings == () and report.defects == 0
    assert {name: split.images for name, split in report.splits.items()} == {"labeled": 6, "unlabeled": 3, "val": 2}
    labeled, val = report.splits["labeled"], report.splits["val"]
    # x0: six rows of 8 pixels are a, two are ignored; x3: all a; x1, x4: b; x2, x5: c. v0: half a, half b; v1: c.
    assert labeled.pixels.tolist() == [48 + 64, 128, 128] and labeled.ignored == 16
    assert val.pixels.tolist() == [32, 32, 64]
    assert labeled.occurrences.tolist() == [2, 2, 2] and val.occurrences.tolist() == [1, 1, 1]
    assert report.splits["unlabeled"].pixels is None
    text = capsys.readouterr().out
    assert "nothing to fix" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("0 a"))
    assert row[2:] == ["30.43%", "2", "(33.33%)", "25.00%", "1", "(50.00%)"]
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["to_fix"] == 0 and saved["classes"]["b"]["val"] == {"pixels": 32, "images": 1}
    assert saved["sizes"]["unlabeled"] == {"smallest": "8x8", "median": "8x8", "largest": "8x8"}


def test_every_defect_is_reported(sound, capsys):
    """One defect of each kind, in a single check."""
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
    with pytest.raises(prepare.DefectsError, match=f"the data of {sound}: 9 to fix"):
        prepare.check(configure(sound))
    report = check_data(configure(sound))
    reported = {kind: "\n".join(finding.items) for kind, finding in findings(report).items()}
    for kind, level, texts in (
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
        assert KINDS[kind].level == level
        for text in texts:
            assert text in reported[kind], (kind, text, reported[kind])
    assert set(reported) == {
        "layout", "unreadable_images", "unreadable_masks", "size_mismatches", "uncovered_values", "leaks", "duplicates",
        "repeated", "classes_not_in_labeled", "unlike_sizes", "unlike_colors",
    }  # fmt: skip
    # x3 has no mask of its size, x4 and x5 no known values, x2 no mask; u0 counts twice, x0 and x1 by their masks.
    assert {name: split.masks for name, split in report.splits.items()} == {"labeled": 5, "unlabeled": None, "val": 2}
    text = capsys.readouterr().out
    assert str(sound) not in text.partition("\nclass")[2]  # Names are those below the root.
    assert text.count("FIX") == 6 and "9 to fix" in text


def test_crops_that_the_encoder_cannot_take(sound, capsys):
    config = custom.get_config(f"root={sound},labeled=train.txt,val=val.txt,encoder=dinov2_w64,crop=20")
    with pytest.raises(prepare.DefectsError, match="1 to fix"):
        prepare.check(config)
    text = capsys.readouterr().out
    assert "FIX   crops that the encoder cannot take: 1" in text
    assert "config.data.crop is 20; dinov2_w64 needs a multiple of 14: 14 or 28" in text
    config.data.crop, config.eval.mode, config.eval.crop = 28, "sliding_window", 30
    (finding,) = check_data(config).findings
    assert finding.items == (
        "config.eval.crop, the sliding window, is 30; dinov2_w64 needs a multiple of 14: 28 or 42",
    )
    config.model.encoder = "dinov2_w46"
    with pytest.raises(ConfigError, match="unknown config.model.encoder 'dinov2_w46'; did you mean"):
        check_data(config)


def test_folders(tmp_path):
    """Images without masks, masks without images, images in two lists, classes without validation images."""
    root = make_root(tmp_path, {"a": (0,), "b": (0,), "c": (255,), "d": (0,)}, images=("x",))
    save_mask(root / "masks/y.png", (0,))
    reported = findings(check_data(custom.get_config(f"root={root},val=0.5")))
    assert "1 images in images have no mask: images/x.png" in reported["layout"].items[0]
    assert reported["unused_masks"].items == ("masks/y.png",)
    assert reported["classes_not_in_labeled"].items == reported["classes_not_in_val"].items == ("b", "c")
    assert reported["empty_masks"].items == (str(root / "masks/c.png"),)
    assert reported["labeled_in_unlabeled"].items == ("2 of 2 labeled images",)


def test_packed_data(sound, tmp_path):
    """A packed data set gives the report of its files."""
    before = check_data(configure(sound))
    packed = pack_files(configure(sound), str(tmp_path / "packed"))
    config = configure(sound)
    config.data.update({"source": "array_record", "root": str(tmp_path / "packed"), "split": packed.split})
    after = check_data(config)
    assert after.findings == before.findings
    for name, split in before.splits.items():
        assert after.splits[name].images == split.images and after.splits[name].sizes == split.sizes
    assert after.splits["labeled"].pixels.tolist() == before.splits["labeled"].pixels.tolist()


def test_items_are_counted_not_all_printed(sound):
    for n in range(6):
        (sound / f"images/x{n}.png").unlink()
    report = check_data(configure(sound))
    text = check_report.to_text(report)
    assert text.count("missing file") == 5 and "... 1 more" in text and "6 to fix" in text
    assert len(check_report.to_json(report)["findings"][0]["items"]) == 6


def test_names_that_a_terminal_cannot_show(sound):
    (sound / "unlabeled/\udcff.png").write_bytes(b"")
    text = check_report.to_text(check_data(configure(sound)))
    text.encode()
    assert r"\xff.png: " in text


def test_large_images(tmp_path):
    root = make_root(tmp_path, {"a": (0,), "b": (0,)})
    for name in "ab":
        Image.new("RGB", (3000, 4)).save(root / f"images/{name}.png")
        Image.fromarray(np.zeros((4, 3000), np.uint8)).save(root / f"masks/{name}.png")
    assert findings(check_data(custom.get_config(f"root={root}")))["large"].items[0].endswith("3000 pixels")


def test_nothing_to_check(tmp_path):
    with pytest.raises(DataError, match="images are generated"):
        check_data(shapes.get_config())
    root = make_root(tmp_path, {"a": (0,), "b": (0,)})
    with pytest.raises(DataError, match="no such folder"):
        check_data(custom.get_config(f"root={root},masks=absent"))


def test_exif_and_color_maps(tmp_path):
    """The check reads what training reads: rotated images, masks of colors."""
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
    report = check_data(custom.get_config(f"root={root},label_map=map.txt"))
    assert not report.defects
    assert (report.splits["labeled"].pixels + report.splits["val"].pixels).tolist() == [16 + 64, 16, 0]


def test_files_of_the_user_stay(tmp_path, capsys):
    config = custom.get_config(f"root={make_root(tmp_path / 'root', {'a': (0, 1), 'b': (0, 1)})}")
    (tmp_path / "own.json").write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match="own.json: exists already, and holds no earlier dssn_jax check"):
        prepare.check(config, to=str(tmp_path / "own.json"))
    assert (tmp_path / "own.json").read_text() == '{"mine": 1}'
    for _ in range(2):  # A report may be renewed.
        prepare.check(config, to=str(tmp_path / "new.json"))
