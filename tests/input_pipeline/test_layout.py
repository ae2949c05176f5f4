"""Which images the folders and lists of configs/custom.py name, and what is wrong with them."""

import hashlib

import pytest
from PIL import Image

from configs import custom
from input_pipeline.errors import DataError
from input_pipeline.layout import IMAGE_SUFFIXES, find_layout, images_below
from input_pipeline.sources.open import digest, open_source, open_sources
from tests.input_pipeline.own_images import CLASSES, make_root, save_image, save_mask


def _data(root, **values):
    arguments = ",".join(f"{key}={value}" for key, value in {"root": root, **values}.items())
    return custom.get_config(arguments).data


def _images(split):
    return {entry.image for entry in split.entries}


def test_conventions(tmp_path):
    root = make_root(tmp_path / "my images", {f"{n}": (0,) for n in range(10)}, unlabeled=("u", "v"))
    data = _data(root)
    layout = find_layout(data)
    assert data.classes == CLASSES and layout.defects == ()
    # By definition, the held-out fifth are the images with the smallest digests.
    names = sorted(
        (f"images/{n}.png" for n in range(10)), key=lambda name: hashlib.sha256(f"validation\n{name}".encode()).digest()
    )
    assert _images(layout.val) == set(names[:2]) and _images(layout.labeled) == set(names[2:])
    assert _images(layout.unlabeled) == {"unlabeled/u.png", "unlabeled/v.png"}
    assert all(entry.mask == entry.image.replace("images", "masks") for entry in layout.labeled.entries)


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
    layout = find_layout(_data(root, unmasked="unlabeled"))
    assert _images(layout.unlabeled) == {"images/x.png", "images/y.png"} and not layout.defects
    save_image(root / "images/sub/z.png", 9)
    layout = find_layout(_data(root, unlabeled="images/sub", unmasked="unlabeled"))
    assert _images(layout.unlabeled) == {"images/x.png", "images/y.png", "images/sub/z.png"}


def test_masks_are_matched(tmp_path):
    """In a folder below that of the images; next to the images; ambiguous ones are reported."""
    root = make_root(tmp_path / "inside", {"a": (0,), "b": (0,)})
    (root / "masks").rename(root / "images/masks")
    assert not find_layout(_data(root, masks="images/masks")).defects
    root = make_root(tmp_path / "beside", {})
    for name in "ab":
        save_image(root / f"images/{name}.png", ord(name))
        save_mask(root / f"images/{name}_mask.png", (0,))
    layout = find_layout(_data(root, masks="images", mask_suffix="_mask"))
    assert {tuple(entry) for split in (layout.labeled, layout.val) for entry in split.entries} == {
        (f"images/{name}.png", f"images/{name}_mask.png") for name in "ab"
    }
    root = make_root(tmp_path / "twice", {"a": (0,), "b": (0,), "c": (0,), "d": (0,)})
    save_mask(root / "masks/a.bmp", (0,))
    save_image(root / "images/b.jpg", 8)
    several, two = find_layout(_data(root)).defects
    assert "images/a.png: several masks, masks/a.bmp, masks/a.png" in several
    assert "masks/b.png: mask of two images, images/b.jpg, images/b.png" in two


def test_validation_is_held_out_of_folders(tmp_path):
    masks = dict.fromkeys(("a", "b", "c", "val/d", "val/e"), (0,))
    root = make_root(tmp_path, masks)
    layout = find_layout(_data(root, val="images/val", val_masks="masks/val"))
    assert _images(layout.val) == {"images/val/d.png", "images/val/e.png"}
    assert _images(layout.labeled) == _images(layout.unlabeled) == {f"images/{name}.png" for name in "abc"}
    (root / "val.txt").write_text("images/b.png masks/b.png\n")
    layout = find_layout(_data(root, val="val.txt"))
    assert _images(layout.labeled) == {f"images/{name}.png" for name in ("a", "c", "val/d", "val/e")}


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
def test_missing_folders_and_lists_are_named(tmp_path, values, message):
    root = make_root(tmp_path, dict.fromkeys("ab", (0,)))
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        open_sources(custom.get_config(",".join(f"{k}={v}" for k, v in {"root": root, **values}.items())))


def test_digest_of_odd_names(tmp_path):
    """Names that are not UTF-8, as in some archives, are valid."""
    root = make_root(tmp_path, {"a": (0,), "b": (0,)})
    for folder in ("images", "masks"):
        (root / folder / "b.png").rename(root / folder / "\udcff b.png")
    sources = open_sources(custom.get_config(f"root={root},val=0.5"))
    assert digest(sources.labeled) != digest(sources.val)


def test_image_suffixes_are_those_of_pillow():
    formats = {"BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"}
    assert {suffix for suffix, name in Image.registered_extensions().items() if name in formats} == set(IMAGE_SUFFIXES)


@pytest.mark.parametrize("val", ["val_images", "val.txt"])
def test_validation_images_alone(tmp_path, val):
    """Neither the folders of the other images nor the overlap with them matters."""
    root = make_root(tmp_path, {})
    for name in "ab":
        save_image(root / f"val_images/{name}.png", 0)
        save_mask(root / f"val_masks/{name}.png", (1,))
    (root / "val.txt").write_text("val_images/b.png val_masks/b.png\n")
    for folder in (root / "images", root / "masks"):
        folder.rmdir()
    config = custom.get_config(f"root={root},val={val},val_masks=val_masks,unlabeled=absent")
    source = open_source(config, "val")
    assert [source.name(i) for i in range(len(source))][-1] == "val_images/b.png" and (source[0]["label"] == 1).all()
    with pytest.raises(DataError, match=r"images: no such folder"):
        open_source(config, "labeled")


def test_a_held_out_fraction_alone_needs_the_labeled_images(tmp_path):
    root = make_root(tmp_path, {f"{n}": (0,) for n in range(10)}, images=("unmasked",))
    config = custom.get_config(f"root={root},unlabeled=absent")
    val = open_source(config, "val")
    config.data.folders.update({"unlabeled": "", "unmasked": "unlabeled"})
    assert digest(val) == digest(open_sources(config).val) and len(val) == 2


def test_links_in_circles_are_followed_once(tmp_path):
    """Two links to the folder that they are in would name images without end."""
    root = make_root(tmp_path / "root", {"a": (0,), "sub/b": (0,)})
    for name in ("images/again", "images/sub/more", "images/sub/up", "masks/again"):
        (root / name).symlink_to(root / name.split("/")[0], target_is_directory=True)
    other = tmp_path / "other"
    save_image(other / "c.png", 3)
    for name in ("images/linked", "images/twice"):  # Links to folders elsewhere count, each under its own name.
        (root / name).symlink_to(other, target_is_directory=True)
    names = images_below(str(root / "images"))
    assert names == ["a.png", "linked/c.png", "sub/b.png", "twice/c.png"]


@pytest.mark.parametrize("link", [False, True])
def test_validation_images_that_are_labeled_by_a_link(tmp_path, link):
    root = make_root(tmp_path / "root", dict.fromkeys("ab", (0,)), size=8)
    (root / "val").mkdir()
    if link:
        (root / "val/renamed.png").symlink_to(root / "images/b.png")
        (root / "linked").symlink_to(root / "val", target_is_directory=True)
    else:
        save_image(root / "val/renamed.png", 9)
        (root / "linked").symlink_to(root / "val", target_is_directory=True)
    (root / "val.txt").write_text("linked/renamed.png masks/b.png\n")
    (root / "train.txt").write_text("images/a.png masks/a.png\nimages/b.png masks/b.png\n")
    layout = find_layout(_data(root, labeled="train.txt", val="val.txt"))
    messages = [message for message in layout.defects if "1 labeled images are validation images too" in message]
    assert len(messages) == link and all("linked/renamed.png" in message for message in messages)


def test_odd_names_in_folders_are_read_and_shown(tmp_path):
    odd = "\x1b[31m\n\udcff"
    root = make_root(tmp_path, dict.fromkeys("abc", (0,)))
    for folder in ("images", "masks"):
        (root / folder / "a.png").rename(root / folder / f"{odd}.png")
    config = custom.get_config(f"root={root},val=0.4")
    assert sum(map(len, open_sources(config)[::2])) == 3
    (root / f"images/{odd}.png").write_bytes(b"text")
    with pytest.raises(DataError) as error:
        open_sources(config)
    assert r"images/\x1b[31m\n\xff.png: not an image" in str(error.value)
    (root / f"masks/{odd}.png").unlink()
    with pytest.raises(DataError, match=r"1 images in images have no mask: images/\\x1b\[31m\\n\\xff\.png"):
        open_sources(config)
