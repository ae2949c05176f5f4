"""Images of every mode against the definition of the mode in NumPy; orientations against theirs."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from input_pipeline import decode
from input_pipeline.decode import Encoded
from input_pipeline.errors import DataError

RNG = np.random.default_rng(0)
# Definition of the EXIF orientations: from the stored to the displayed pixels.
ORIENTED = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: np.swapaxes(stored, 0, 1),
    6: lambda stored: np.swapaxes(stored, 0, 1)[:, ::-1],
    7: lambda stored: np.swapaxes(stored[::-1, ::-1], 0, 1),
    8: lambda stored: np.swapaxes(stored, 0, 1)[::-1],
}


def random(*shape, below=256):
    return RNG.integers(below, size=shape, dtype=np.uint8)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return Encoded(buffer.getvalue(), f"a.{format.lower()}")


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def png(width, height, depth, color, rows, *more, behind=b""):
    """Encodes a PNG from rows of packed bytes, with `more` chunks before the pixels and EXIF data `behind` them."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), *more, (b"IDAT", pixels), *([(b"eXIf", behind)] if behind else []), (b"IEND", b"")]
    content = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return Encoded(b"\x89PNG\r\n\x1a\n" + content, "hand.png")


def gray():
    values = random(4, 6)
    return encoded(Image.fromarray(values)), np.stack([values] * 3, -1)


def gray_of_four_bits():
    values = random(4, 6, below=16)
    rows = [bytes(row[::2] << 4 | row[1::2]) for row in values]
    return png(6, 4, 4, 0, rows), np.stack([values * 17] * 3, -1)  # 15 is white, 255.


def one_bit():
    values = random(4, 6, below=2)
    return encoded(Image.fromarray(values * 255).convert("1", dither=0)), np.stack([values * 255] * 3, -1)


def gray_and_opaque_alpha():
    values = random(4, 6)
    file = encoded(Image.fromarray(np.stack([values, np.full_like(values, 255)], -1), "LA"))
    return file, np.stack([values] * 3, -1)


def opaque_alpha():
    values = random(4, 6, 4)
    values[..., 3] = 255
    return encoded(Image.fromarray(values, "RGBA")), values[..., :3]


def palette():
    colors, values = random(256, 3), random(4, 6)
    image = Image.fromarray(values)
    image.putpalette(colors.ravel().tolist())
    return encoded(image), colors[values]


def palette_with_unused_transparency():
    colors, values = random(256, 3), random(4, 6, below=200)
    image = Image.fromarray(values)
    image.putpalette(colors.ravel().tolist())
    return encoded(image, transparency=250), colors[values]


def colors_of_sixteen_bits():
    values = RNG.integers(1 << 16, size=(4, 6, 3), dtype=np.uint16)
    return png(6, 4, 16, 2, [row.astype(">u2").tobytes() for row in values]), (values >> 8).astype(np.uint8)


def cmyk_tiff():
    values = random(4, 6, 4)
    return encoded(Image.fromarray(values, "CMYK"), "TIFF"), rgb_of_cmyk(values)


def rgb_of_cmyk(values):
    ink = values.astype(float) / 255
    return np.rint(255 * (1 - ink[..., :3]) * (1 - ink[..., 3:]))


@pytest.mark.parametrize(
    "make",
    [
        gray, gray_of_four_bits, one_bit, gray_and_opaque_alpha, opaque_alpha, palette,
        palette_with_unused_transparency, colors_of_sixteen_bits, cmyk_tiff,
    ],
)  # fmt: skip
def test_images_of_every_mode(make):
    file, expected = make()
    image = decode.image(file)
    assert image.dtype == np.uint8 and decode.image_size(file) == image.shape[:2] == (4, 6)
    # The conversion of CMYK multiplies rounded values.
    assert np.abs(image - expected.astype(float)).max() <= (1 if make is cmyk_tiff else 0)


def test_cmyk_jpeg_is_not_inverted():
    """Adobe's programs and libjpeg store ink inverted and mark this in the file."""
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 0] = 200
    file = encoded(Image.fromarray(ink, "CMYK"), "JPEG", quality=100)
    assert b"Adobe" in file.content
    assert np.abs(decode.image(file) - np.array([55.0, 255, 255])).max() <= 2
    unmarked = file.content.replace(b"Adobe", b"Other")
    with pytest.raises(DataError, match=r"b\.jpg: CMYK JPEG without Adobe's marker"):
        decode.image(Encoded(unmarked, "b.jpg"))


def half_transparent(mode):
    image = Image.fromarray(random(4, 6, 4), "RGBA")
    alpha = np.full((4, 6), 255, np.uint8)
    alpha[:2] = 254
    image.putalpha(Image.fromarray(alpha))
    return encoded(image.convert(mode))


def transparent_color():
    """An RGB image with one color declared transparent by a chunk."""
    return png(2, 1, 8, 2, [bytes([1, 2, 3, 4, 5, 6])], (b"tRNS", struct.pack(">HHH", 4, 5, 6)))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (half_transparent("RGBA"), "mode 'RGBA' with transparency in 50.0% of the pixels"),
        (half_transparent("LA"), "mode 'LA' with transparency in 50.0% of the pixels"),
        (encoded(Image.new("P", (6, 4)), transparency=0), "mode 'P' with transparency in 100.0%"),
        (transparent_color(), "mode 'RGB' with transparency in 50.0%"),
        (encoded(Image.new("I;16", (6, 4))), "mode 'I;16' .*expected 8 bits per channel.*scale it to 0..255"),
        (encoded(Image.new("I", (6, 4)), "TIFF"), "mode 'I' .*expected 8 bits"),
        (encoded(Image.new("F", (6, 4)), "TIFF"), "mode 'F' .*floats"),
        (encoded(Image.new("LAB", (6, 4)), "TIFF"), "mode 'LAB'; expected RGB or gray"),
    ],
)
def test_refused_images_are_named(file, message):
    with pytest.raises(DataError, match=f"{file.where}: image of {message}"):
        decode.image(file)


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_of_images(format, orientation):
    image = Image.fromarray(random(16, 24, 3))
    options = {"WEBP": {"lossless": True}, "JPEG": {"subsampling": 0}}.get(format, {})
    stored = np.asarray(Image.open(io.BytesIO(encoded(image, format, **options).content)).convert("RGB"))
    file = encoded(image, format, exif=exif(orientation), **options)
    image, expected = decode.image(file), ORIENTED[orientation](stored)
    np.testing.assert_array_equal(image, expected)
    assert decode.image_size(file) == expected.shape[:2]


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, "P"])
def test_exif_orientation_of_masks(kind, orientation):
    values = random(4, 6) if kind == "P" else RNG.integers(np.iinfo(kind).max, size=(4, 6), dtype=kind)
    image = Image.fromarray(values)
    if kind == "P":
        image.putpalette(random(768).tolist())
    file = encoded(image, exif=exif(orientation))
    np.testing.assert_array_equal(decode.mask(file, colors=False), ORIENTED[orientation](values))
    assert decode.mask_size(file, colors=False) == ORIENTED[orientation](values).shape


def test_exif_data_after_the_pixels_is_refused():
    file = png(2, 1, 8, 0, [b"\1\2"], behind=exif(6).tobytes()[6:])
    with pytest.raises(DataError, match=r"hand\.png: PNG with EXIF data after the pixels"):
        decode.image(file)


def test_damaged_exif_is_ignored():
    jpeg = encoded(Image.fromarray(random(16, 24, 3)), "JPEG", exif=exif(6))
    start = jpeg.content.index(b"Exif\0\0") + 6
    damaged = jpeg.content[:start] + b"\xff" * 8 + jpeg.content[start + 8 :]
    assert decode.image(Encoded(damaged, "a.jpg")).shape == (16, 24, 3)
    assert decode.image_size(Encoded(damaged, "a.jpg")) == (16, 24)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_masks_hold_ids(dtype):
    values = RNG.integers(np.iinfo(dtype).max + 1, size=(4, 6), dtype=dtype)
    np.testing.assert_array_equal(decode.mask(encoded(Image.fromarray(values)), colors=False), values)


def test_masks_of_one_bit_hold_0_and_1():
    values = random(4, 6, below=2)
    ids = decode.mask(encoded(Image.fromarray(values * 255).convert("1", dither=0)), colors=False)
    assert ids.dtype == np.uint8
    np.testing.assert_array_equal(ids, values)


@pytest.mark.parametrize("make", [opaque_alpha, palette, gray])
def test_masks_of_colors(make):
    file, expected = make()
    red, green, blue = np.moveaxis(expected.astype(int), -1, 0)
    np.testing.assert_array_equal(decode.mask(file, colors=True), red * 65536 + green * 256 + blue)


@pytest.mark.parametrize(
    ("file", "colors", "message"),
    [
        (
            encoded(Image.new("RGB", (6, 4))),
            False,
            "mode 'RGB'; .*config.data.label_map to a file with lines `RED GREEN",
        ),
        (encoded(Image.new("L", (6, 4)), "JPEG"), False, "mask in JPEG, which changes values on saving"),
        (encoded(Image.new("RGB", (6, 4)), "JPEG"), True, "mask in JPEG"),
        (encoded(Image.new("I;16", (6, 4))), True, "mode 'I;16'; config.data.label_map expects colors"),
        (encoded(Image.new("F", (6, 4)), "TIFF"), False, "mode 'F'"),
        (encoded(Image.new("I", (6, 4), 1 << 16), "TIFF"), False, r"mask values 65536..65536 found; expected 0..65535"),
        (png(6, 4, 4, 0, [b"\1\2\3"] * 4), False, "mask of 4-bit gray"),
        (png(1, 1, 16, 2, [b"\1\2\3\4\5\6"]), True, "whose values decoding changes"),
        (half_transparent("RGBA"), True, "with transparency in 50.0%"),
    ],
)
def test_refused_masks_are_named(file, colors, message):
    with pytest.raises(DataError, match=f"{file.where}: .*{message}"):
        decode.mask(file, colors)


def test_inverted_gray_mask_is_refused():
    """Pillow reads the ids 0, 1, 2 of a TIFF in which 0 is white as 255, 254, 253."""
    tiff = encoded(Image.fromarray(np.array([[0, 1, 2]], np.uint8)), "TIFF").content
    black_is_zero = struct.pack("<HHLL", 262, 3, 1, 1)
    assert black_is_zero in tiff
    file = Encoded(tiff.replace(black_is_zero, struct.pack("<HHLL", 262, 3, 1, 0)), "inverted.tif")
    assert np.asarray(Image.open(io.BytesIO(file.content))).max() == 255
    with pytest.raises(DataError, match=r"inverted\.tif: mask stored as 'L;I'"):
        decode.mask(file, colors=False)


def test_other_formats_are_not_opened(monkeypatch):
    """Pillow would run Ghostscript for this file."""
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("a program was started"))
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: pytest.fail("a program was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    for read in (decode.image, decode.image_size, decode.size):
        with pytest.raises(
            DataError, match=r"a\.png: not an image that can be opened: unknown format; expected BMP, .*WEBP"
        ):
            read(Encoded(eps, "a.png"))


@pytest.mark.parametrize("size", [(20_000, 20_000), (1 << 31 - 1, 1), (1, 1 << 31 - 1)])
def test_huge_images_are_refused_by_their_header(size):
    file = png(*size, 8, 0, [b"\0" * 10])
    with pytest.raises(DataError, match=r"hand\.png: not an image that can be opened: too large; expected at most 17"):
        decode.image_size(file)
    with pytest.raises(DataError, match=r"hand\.png: .*too large"):
        decode.mask(file, colors=False)


def frames(format, count, **options):
    pictures = [Image.fromarray(random(4, 6, 3)).quantize(16) for _ in range(count)]
    if format in ("WEBP", "MPO", "TIFF"):
        pictures = [picture.convert("RGB") for picture in pictures]
    return encoded(pictures[0], format, save_all=True, append_images=pictures[1:], **options)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_files_of_several_pictures_are_refused(format):
    file = frames(format, 3)
    assert Image.open(io.BytesIO(file.content)).n_frames == 3
    for read in (decode.image, decode.image_size, lambda file: decode.mask(file, colors=True)):
        with pytest.raises(
            DataError, match=rf"a\.{format.lower()}: an animation, or several pages \({format}\); expected"
        ):
            read(file)
    assert decode.image_size(frames(format, 1)) == decode.image(frames(format, 1)).shape[:2] == (4, 6)


def test_the_first_picture_of_a_camera_file_counts():
    """Cameras store further pictures, such as thumbnails, after the photo."""
    file = frames("MPO", 2)
    assert Image.open(io.BytesIO(file.content)).n_frames == 2
    assert decode.image(file).shape == (*decode.image_size(file), 3) == (4, 6, 3)


def test_smaller_copies_in_a_tiff_do_not_count():
    """Maps hold pyramids of smaller copies."""
    picture, copies = Image.fromarray(random(8, 12)), [Image.new("L", (6, 4)), Image.new("L", (3, 2))]
    for copy in copies:
        copy.encoderinfo = {"tiffinfo": {254: 1}}
    file = encoded(picture, "TIFF", save_all=True, append_images=copies)
    assert Image.open(io.BytesIO(file.content)).n_frames == 3
    np.testing.assert_array_equal(decode.mask(file, colors=False), np.asarray(picture))
    assert decode.image_size(file) == (8, 12)


def test_a_tiff_with_fewer_strips_than_rows_is_damaged():
    """Pillow would leave the other rows black."""
    tiff = encoded(Image.fromarray(random(16, 24)), "TIFF").content
    height = struct.pack("<HHLL", 257, 4, 1, 16)
    assert height in tiff
    file = Encoded(tiff.replace(height, struct.pack("<HHLL", 257, 4, 1, 17)), "a.tif")
    for read in (decode.image_size, decode.image, lambda file: decode.mask(file, colors=False)):
        with pytest.raises(DataError, match=r"a\.tif: damaged image: it has data of fewer pixels than its size"):
            read(file)


def test_flipped_bits_of_a_png_are_noticed():
    """Pillow does not compare the checksums of pixels."""
    content = encoded(Image.fromarray(random(16, 24, 3)), "PNG").content
    expected = decode.image(Encoded(content, "a.png"))
    for bit in range(8 * 8, 8 * len(content), 5):
        data = bytearray(content)
        data[bit // 8] ^= 1 << bit % 8
        try:
            decoded = decode.image(Encoded(bytes(data), "a.png"))
        except DataError as error:
            assert "a.png: " in str(error)
        else:
            np.testing.assert_array_equal(decoded, expected)
