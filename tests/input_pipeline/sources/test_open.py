"""Sources: decoded records of files, errors that name the file, and what opening checks."""

import io
import os
import pickle
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from configs import camvid
from input_pipeline.errors import DataError
from input_pipeline.labels import Labels
from input_pipeline.sources.encoded import check_records
from input_pipeline.sources.folder import FolderSource
from input_pipeline.sources.open import Sources, digest, open_source, open_sources
from input_pipeline.split_lists import Entry, read_list

CAMVID = os.path.join(os.path.dirname(__file__), "../../../../shared/camvid")


def _source(tmp_path, image, mask=None, classes=21, labeled=True):
    """Returns a source of one record from PIL images or encoded bytes."""
    for name, content in (("image", image), ("mask.png", mask)):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            content.save(tmp_path / name, format="PNG")
    labels = Labels([f"class {i}" for i in range(classes)]) if labeled else None
    return FolderSource(str(tmp_path), [Entry("image", "mask.png")], "list.txt", labels)


def _rgb(size=(6, 4)):
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(size[1], size[0], 3), dtype=np.uint8))


def _mask(values):
    return Image.fromarray(np.array(values, np.uint8))


def _encode(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def _raises(source, *patterns):
    """Checks that reading the record raises a DataError that matches every pattern."""
    for pattern in patterns:
        with pytest.raises(DataError, match=pattern):
            source[0]


def test_record(tmp_path):
    image = _rgb()
    values = np.random.default_rng(1).integers(21, size=(4, 6))
    values[0, 0] = 255
    source = _source(tmp_path, image, _mask(values))
    assert len(source) == 1 and source.name(0) == "image" and source.size(0) == (4, 6)
    record = source[0]
    np.testing.assert_array_equal(record["image"], np.asarray(image))
    np.testing.assert_array_equal(record["label"], values)
    assert record["image"].dtype == record["label"].dtype == np.uint8


def test_unlabeled_opens_no_mask(tmp_path):
    source = _source(tmp_path, _rgb(), b"not a mask", labeled=False)
    source.check_headers()
    assert set(source[0]) == {"image"}


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_become_rgb(tmp_path, mode):
    image = _rgb().convert(mode)
    format_ = "TIFF" if mode == "CMYK" else "PNG"
    source = _source(tmp_path, _encode(image, format=format_), labeled=False)
    np.testing.assert_array_equal(source[0]["image"], np.asarray(image.convert("RGB")))


def test_palette_mask_reads_as_ids(tmp_path):
    values = np.array([[0, 1, 2, 20, 255, 15]] * 4)
    mask = _mask(values).convert("P")
    mask.putpalette([channel for i in range(256) for channel in (255 - i, 3, 200)])
    mask.putdata(values.ravel().tolist())
    assert mask.convert("RGB").getpixel((1, 0)) == (254, 3, 200)  # The colors in the file differ from its ids.
    np.testing.assert_array_equal(_source(tmp_path, _rgb(), mask)[0]["label"], values)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True, "quality": 30}])
def test_jpeg_pixels_are_pillows(tmp_path, options):
    """Exactly: both use libjpeg-turbo with the exact inverse transform."""
    smooth = Image.fromarray(np.asarray(_rgb((9, 7)).resize((61, 45), Image.Resampling.BICUBIC)))
    jpeg = _encode(smooth, format="JPEG", **options)
    image = _source(tmp_path, jpeg, labeled=False)[0]["image"]
    np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(jpeg))))
    assert image.dtype == np.uint8 and image.shape == (45, 61, 3)


def test_jpegs_of_other_modes_are_read(tmp_path):
    for mode in ("L", "CMYK"):
        jpeg = _encode(_rgb((16, 16)).convert(mode), format="JPEG")
        image = _source(tmp_path, jpeg, labeled=False)[0]["image"]
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")))


def test_truncated_jpeg(tmp_path):
    jpeg = _encode(_rgb((64, 64)), format="JPEG")
    source = _source(tmp_path, jpeg[: len(jpeg) // 2], labeled=False)
    source.check_headers()  # The header is complete.
    _raises(source, rf"{tmp_path}/image: damaged image.*truncated")


def test_truncated_mask(tmp_path):
    noise = _mask(np.random.default_rng(0).integers(21, size=(64, 64)))
    png = _encode(noise, format="PNG")
    _raises(_source(tmp_path, _rgb((64, 64)), png[: len(png) // 2]), r"mask\.png: damaged image")


def test_not_an_image(tmp_path):
    source = _source(tmp_path, b"<html>404</html>", labeled=False)
    _raises(source, r"/image: not an image")
    with pytest.raises(DataError, match=r"/image: not an image"):
        source.check_headers()


def test_missing_files(tmp_path):
    _raises(_source(tmp_path, None, labeled=False), r"missing file .*/image \(listed in .*list\.txt\)")
    _raises(_source(tmp_path, _rgb()), r"missing file .*/mask\.png")


def test_mask_value_out_of_range(tmp_path):
    values = np.zeros((4, 6))
    values[1, 2], values[2, 2] = 200, 255
    source = _source(tmp_path, _rgb(), _mask(values))
    source.check_headers()
    _raises(source, r"mask\.png: mask values 200 found", r"0\.\.20 \(21 classes\) or 255")


def test_sizes_differ(tmp_path):
    source = _source(tmp_path, _rgb((6, 4)), _mask(np.zeros((6, 4))))
    pattern = r"mask\.png: mask of 4x6 pixels; expected 6x4, the size of .*/image"
    _raises(source, pattern)
    with pytest.raises(DataError, match=pattern):
        source.check_headers()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_mask_mode_refused(tmp_path, mode):
    mask = Image.new(mode, (6, 4))
    source = _source(tmp_path, _rgb(), mask)
    _raises(source, rf"mask\.png: mask of mode '{mode}'; expected class ids in 8-bit")
    with pytest.raises(DataError, match="mask of mode"):
        source.check_headers()


def test_four_bit_gray_mask_refused(tmp_path):
    """Pillow would read the ids 0, 1, 2 of such a file as 0, 17, 34."""
    rows = b"".join(b"\0" + bytes([0x01, 0x20, 0x12]) for _ in range(4))
    header = struct.pack(">IIBBBBB", 6, 4, 4, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    source = _source(tmp_path, _rgb(), png)
    assert np.asarray(Image.open(tmp_path / "mask.png")).max() == 34
    _raises(source, "mask of 4-bit gray")


def test_sixteen_bit_image_refused(tmp_path):
    _raises(_source(tmp_path, Image.new("I;16", (6, 4)), labeled=False), r"/image: image of mode 'I;16'")


def test_check_headers_counts_all(folder):
    for number in (3, 5, 6, 7, 8, 9):
        (folder / f"images/{number}.png").unlink()
    path = str(folder / "splits/small/unlabeled.txt")
    source = FolderSource(str(folder), read_list(path, labeled=False), path, labels=None)
    with pytest.raises(DataError) as caught:
        source.check_headers()
    assert str(caught.value).count("missing file") == 5
    assert f"... 6 of the 10 images of {path}" in str(caught.value)


def test_open_sources(folder, config):
    sources = open_sources(config)
    assert [len(source) for source in sources] == [3, 10, 2]
    assert sources.val.name(1) == "images/11.png"
    assert "label" not in sources.unlabeled[0]
    np.testing.assert_array_equal(sources.val[1]["label"], np.full((16, 16), 2))


def test_open_sources_checks_headers(folder, config):
    (folder / "masks/11.png").unlink()
    with pytest.raises(DataError, match=r"missing file .*masks/11\.png \(listed in .*val\.txt\)"):
        open_sources(config)


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("source", "floder", r"config\.data\.source is 'floder'; known: folder, array_record, tfds, shapes"),
        ("root", "", r"config\.data\.root is not set"),
        ("root", "/absent", r"data root '/absent' is not a folder"),
        ("classes", (), r"config\.data\.classes is empty"),
        ("ignore", 256, r"ignored value 256"),
        ("split", "smal", r"did you mean 'small'"),
    ],
)
def test_open_sources_bad_config(folder, config, key, value, pattern):
    config.data[key] = value
    with pytest.raises(DataError, match=pattern):
        open_sources(config)


@pytest.mark.parametrize("split", Sources._fields)
def test_open_source(folder, config, split):
    """A single source needs only its own list and files."""
    expected = digest(getattr(open_sources(config), split))
    lists = {"labeled": "small/labeled.txt", "unlabeled": "small/unlabeled.txt", "val": "val.txt"}
    for name in set(lists) - {split}:
        (folder / "splits" / lists[name]).unlink()
    if split == "val":
        (folder / "splits/small").rmdir()
    for path in (folder / "images").iterdir():
        if path.name not in (folder / "splits" / lists[split]).read_text():
            path.unlink()
    source = open_source(config, split)
    assert digest(source) == expected and ("label" in source[0]) == (split != "unlabeled")


def test_sources_and_errors_pickle(folder, config):
    sources = pickle.loads(pickle.dumps(open_sources(config)))
    np.testing.assert_array_equal(sources.labeled[2]["image"][..., 0], 2)
    error = pickle.loads(pickle.dumps(DataError("a.png: bad")))
    assert type(error) is DataError and str(error) == "a.png: bad"


@pytest.mark.skipif(not os.path.isdir(CAMVID), reason="needs CamVid in ../shared")
def test_camvid():
    config = camvid.get_config("split=1_8")
    config.data.root = CAMVID
    sources = open_sources(config)
    # Labeled images are not listed as unlabeled ones again: 46 + 321 = 367 training images.
    assert [len(source) for source in sources] == [46, 321, 101]
    record = sources.val[0]
    assert record["image"].shape == (360, 480, 3) and record["label"].shape == (360, 480)
    assert set(np.unique(record["label"])) <= {*range(11), 255}


def test_a_file_that_changes_after_opening_is_named(folder, config):
    source = open_sources(config).unlabeled
    Image.new("RGB", (9, 8)).save(folder / "images/4.png")
    with pytest.raises(DataError, match=r"images/4\.png: 9x8 pixels; it had 16x16 when it was opened"):
        source[4]


def test_check_records_names_what_cannot_be_read(folder, config):
    """Headers alone do not show a value without a class or a truncated image."""
    Image.fromarray(np.full((16, 16), 200, np.uint8)).save(folder / "masks/11.png")
    content = (folder / "images/10.png").read_bytes()
    (folder / "images/10.png").write_bytes(content[:-30])
    source = open_source(config, "val")
    with pytest.raises(DataError) as error:
        check_records(source)
    assert "masks/11.png: mask values 200 found" in str(error.value)
    assert "images/10.png: damaged image" in str(error.value)
    counts = []
    assert check_records(open_source(config, "unlabeled"), progress=counts.append) == "" and sum(counts) == 10


def test_check_records_warns_of_masks_that_are_ignored(folder, config):
    source = open_sources(config).labeled
    assert check_records(source) == ""
    for number in (0, 2):
        Image.fromarray(np.full((16, 16), 255, np.uint8)).save(folder / f"masks/{number}.png")
    warning = check_records(source)
    assert re.search(
        r"labeled\.txt: every pixel is ignored in the masks of 2 of the 3 images that were checked", warning
    )
    assert "images/0.png, images/2.png" in warning and "images/1.png" not in warning
    (folder / "masks/1.png").write_bytes(b"not read")
    assert "of 2 of the 2 images" in check_records(source, most=2)
