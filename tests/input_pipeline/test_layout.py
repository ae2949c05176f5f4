import hashlib

import pytest

from configs import custom
from configs.checks import ConfigError
from input_pipeline.errors import DataError
from input_pipeline.layout import find_layout
from input_pipeline.sources.open import digest, open_sources
from tests.input_pipeline.own_images import CLASSES, make_root, save_image, save_mask


def _data(root, **values):
    arguments = ",".join(f"{key}={value}" for key, value in {"root": root, **values}.items())
    return custom.get_config(arguments).data


def _images(part):
    return {entry.image for entry in part.entries}


def test_conventions(tmp_path):
    root = make_root(tmp_path / "my images", {f"{n}": (0,) for n in range(10)}, unlabeled=("u", "v"))
    data = _data(root)
    found = find_layout(data)
    assert data.classes == CLASSES and found.defects == ()
    # The held-out fifth, by the definition: the images with the smallest digests.
    names = sorted(
        (f"images/{n}.png" for n in range(10)), key=lambda name: hashlib.sha256(f"validation\n{name}".encode()).digest()
    )
    assert _images(found.val) == set(names[:2]) and _images(found.labeled) == set(names[2:])
    assert _images(found.unlabeled) == {"unlabeled/u.png", "unlabeled/v.png"}
    assert all(entry.mask == entry.image.replace("images", "masks") for entry in found.labeled.entries)


def test_sources_of_folders(tmp_path):
    root = make_root(tmp_path / "my images", {"a b": (0,), "sub/c": (1,)} | {f"{n}": (2,) for n in range(3)})
    sources = open_sources(custom.get_config(f"root={root},val=0.2"))
    assert [len(source) for source in sources] == [4, 4, 1]
    for source in (sources.labeled, sources.val):
        for index in range(len(source)):
            expected = {"images/a b.png": 0, "images/sub/c.png": 1}.get(source.name(index), 2)
            assert (source[index]["label"] == expected).all()


def test_images_without_mask_are_named_or_unlabeled(tmp_path):
    root = make_root(tmp_path, {"a": (0,), "b": (0,), "c": (0,)}, images=("x", "y"))
    with pytest.raises(DataError, match=r"2 images in images have no mask: .*x\.png, .*y\.png; .*unmasked=unlab"):
        open_sources(custom.get_config(f"root={root}"))
    found = find_layout(_data(root, unmasked="unlabeled"))
    assert _images(found.unlabeled) == {"images/x.png", "images/y.png"} and not found.defects
    save_image(root / "images/sub/z.png", 9)
    found = find_layout(_data(root, unlabeled="images/sub", unmasked="unlabeled"))
    assert _images(found.unlabeled) == {"images/x.png", "images/y.png", "images/sub/z.png"}


def test_masks_are_found(tmp_path):
    """In a folder inside that of the images; beside the images; of several suffixes or images: told."""
    root = make_root(tmp_path / "inside", {"a": (0,), "b": (0,)})
    (root / "masks").rename(root / "images/masks")
    assert not find_layout(_data(root, masks="images/masks")).defects
    root = make_root(tmp_path / "beside", {})
    for name in "ab":
        save_image(root / f"images/{name}.png", ord(name))
        save_mask(root / f"images/{name}_mask.png", (0,))
    found = find_layout(_data(root, masks="images", mask_suffix="_mask"))
    assert {tuple(entry) for part in (found.labeled, found.val) for entry in part.entries} == {
        (f"images/{name}.png", f"images/{name}_mask.png") for name in "ab"
    }
    root = make_root(tmp_path / "twice", {"a": (0,), "b": (0,), "c": (0,), "d": (0,)})
    save_mask(root / "masks/a.bmp", (0,))
    save_image(root / "images/b.jpg", 8)
    several, two = find_layout(_data(root)).defects
    assert "images/a.png: several masks, masks/a.bmp, masks/a.png" in several
    assert "masks/b.png: mask of two images, images/b.jpg and images/b.png" in two


def test_validation_is_held_out_of_folders(tmp_path):
    masks = dict.fromkeys(("a", "b", "c", "val/d", "val/e"), (0,))
    root = make_root(tmp_path, masks)
    found = find_layout(_data(root, val="images/val", val_masks="masks/val"))
    assert _images(found.val) == {"images/val/d.png", "images/val/e.png"}
    assert _images(found.labeled) == _images(found.unlabeled) == {f"images/{name}.png" for name in "abc"}
    (root / "val.txt").write_text("images/b.png masks/b.png\n")
    found = find_layout(_data(root, val="val.txt"))
    assert _images(found.labeled) == {f"images/{name}.png" for name in ("a", "c", "val/d", "val/e")}


def test_validation_in_lists_is_refused(tmp_path):
    root = make_root(tmp_path, dict.fromkeys("abc", (0,)))
    (root / "train.txt").write_text("".join(f"images/{name}.png masks/{name}.png\n" for name in "ab"))
    (root / "val.txt").write_text("./images/../images/b.png masks/b.png\n")
    config = custom.get_config(f"root={root},labeled=train.txt,val=val.txt")
    with pytest.raises(DataError, match=r"train\.txt: 1 labeled images are validation images too .*val_overlap=allow"):
        open_sources(config)
    config.data.val_overlap = "allow"
    assert len(open_sources(config).labeled) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labeled": "pictures"}, r"pictures: no such folder, nor a list .*folders\.labeled"),
        ({"masks": "labels"}, r"labels: no such folder .*folders\.masks"),
        ({"val": "1.5"}, r"folders\.val is 1\.5; expected a fraction between 0 and 1"),
        ({"unlabeled": "empty"}, r"empty: no image in this folder"),
        ({"split": "few"}, r"no folder of split lists"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, values, message):
    root = make_root(tmp_path, dict.fromkeys("ab", (0,)))
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        open_sources(custom.get_config(",".join(f"{k}={v}" for k, v in {"root": root, **values}.items())))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("a\n\nb\n", r"classes\.txt:2: an empty line"),
        ("a\nb\na\n", r"classes\.txt:3: 'a' a second time"),
        ("a\n", r"classes\.txt: 1 names; .*2 to 255"),
        (b"\xff\xfe", r"classes\.txt: cannot be read as text"),
        (None, r"missing file .*classes\.txt"),
    ],
)
def test_bad_class_names(tmp_path, names, message):
    root = make_root(tmp_path, {"a": (0,)})
    (root / "classes.txt").unlink()
    if names is not None:
        (root / "classes.txt").write_bytes(names if isinstance(names, bytes) else names.encode())
    with pytest.raises(ConfigError, match=message):
        custom.get_config(f"root={root}")


def test_splits_or_folders_are_meant(tmp_path):
    root = make_root(tmp_path, {"a": (0,), "b": (0,)})
    (root / "splits/1_8").mkdir(parents=True)
    (root / "splits/1_4").mkdir()
    with pytest.raises(ConfigError, match=r"splits has splits: say split=NAME, one of 1_4, 1_8; or labeled=images"):
        _data(root)
    assert _data(root, labeled="images").split == "" and _data(root, split="1_4").split == "1_4"
    with pytest.raises(ConfigError, match="no such folder"):
        custom.get_config("root=/absent")


def test_digest_of_odd_names(tmp_path):
    """Names that are no UTF-8, as archives made elsewhere have them, are names too."""
    root = make_root(tmp_path, {"a": (0,), "b": (0,)})
    for folder in ("images", "masks"):
        (root / folder / "b.png").rename(root / folder / "\udcff b.png")
    sources = open_sources(custom.get_config(f"root={root},val=0.5"))
    assert digest(sources.labeled) != digest(sources.val)
