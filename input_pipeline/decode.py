"""Decodes image and mask files to arrays; refuses modes whose values are ambiguous.

EXIF orientations are applied to images and to masks, as viewers and annotation tools do.
"""

import contextlib
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from input_pipeline.errors import DataError, printable
from input_pipeline.files import open_regular

# No others are opened: Pillow would run Ghostscript for an EPS file, whatever its name ends with.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "JPEG2000", "TIFF", "WEBP")
_PNG = b"\x89PNG\r\n\x1a\n"  # How a file begins, before its first chunk.
_MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # Pillow opens no larger image.
_SUBFILE_TYPE, _REDUCED = 254, 1  # The tag of a TIFF page, and its bit for a smaller copy of another page.
_MOST_PAGES = 64
_IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_COLOR_MODES = ("1", "L", "P", "RGB", "RGBA")  # Masks whose colors are mapped to classes.
_ID_MODES = ("1", "L", "P", "I;16", "I;16L", "I;16B", "I")  # Masks of ids.
MOST_IDS = 1 << 16  # Ids in a mask are smaller.


class Encoded(NamedTuple):
    """An encoded image or mask: the path of a file, its bytes, or a function that reads them."""

    content: str | bytes | Callable[[], bytes]
    where: str  # Its name in messages.
    listed: str = ""  # The list that names it, for messages.

    @property
    def shown(self) -> str:
        """Returns `where` in one line that is safe to show."""
        return printable(self.where)


def read(file: Encoded) -> bytes:
    """Returns the bytes of the file; raises DataError if it is missing or cannot be read."""
    if isinstance(file.content, bytes):
        return file.content
    if callable(file.content):
        return file.content()
    with _named(file), open_regular(file.content) as opened:
        return opened.read()


def orientation(file: Encoded) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 is as stored, 5 to 8 swap height and width."""
    with _open(file) as opened:
        return _orientation(opened)


def size(file: Encoded) -> tuple[int, int]:
    """Returns (H, W) of an image or mask of any mode from the header; raises DataError if it is not an image."""
    with _open(file) as opened:
        return _size(opened)


def image_size(file: Encoded) -> tuple[int, int]:
    """Returns (H, W) of the result of `image`, from the header.

    Raises:
      DataError: not an image, or a mode that `image` refuses.
    """
    with _open(file) as opened:
        _check_image(opened, file.shown)
        return _size(opened)


def image(file: Encoded) -> np.ndarray:
    """Decodes an image to uint8 [H, W, 3], RGB.

    Raises:
      DataError: not an image, a damaged one, transparent pixels, or a mode whose range of values is ambiguous.
    """
    content = read(file)
    with _open(file._replace(content=content)) as opened:
        _check_image(opened, file.shown)
        if opened.format == "JPEG" and opened.mode == "RGB" and _orientation(opened) == 1:
            # libjpeg-turbo takes two thirds of Pillow's time. Pillow may accept the files that it refuses.
            with contextlib.suppress(ValueError):
                return simplejpeg.decode_jpeg(content, "RGB")
        oriented = _load(opened, file.shown)
        if oriented.has_transparency_data:
            _check_opaque(oriented, file.shown)
        return np.asarray(oriented.convert("RGB"))


def mask_size(file: Encoded, colors: bool) -> tuple[int, int]:
    """Returns (H, W) of the result of `mask`, from the header; raises the same errors."""
    with _open(file) as opened:
        _check_mask(opened, file.shown, colors)
        return _size(opened)


def mask(file: Encoded, colors: bool) -> np.ndarray:
    """Decodes the values of a mask, before they are mapped to classes.

    Args:
      file: the mask.
      colors: whether to return colors; else ids, which are gray values or palette indices.

    Returns:
      Ids, uint8 or int32 [H, W], smaller than 65536; or colors, int32 [H, W], R * 65536 + G * 256 + B.

    Raises:
      DataError: not an image, a damaged one, a mode without such values, or one whose values decoding would change.
    """
    with _open(file._replace(content=read(file))) as opened:
        _check_mask(opened, file.shown, colors)
        oriented = _load(opened, file.shown)
        if not colors:
            values = np.asarray(oriented)
            return values.astype(np.uint8) if values.dtype == bool else _ids(values, file.shown)
        if oriented.has_transparency_data:
            _check_opaque(oriented, file.shown)
        rgb = np.asarray(oriented.convert("RGB"))
        values = rgb[..., 0].astype(np.int32)
        for channel in (1, 2):
            values <<= 8
            values |= rgb[..., channel]
        return values


@contextlib.contextmanager
def _open(file: Encoded) -> Iterator[Image.Image]:
    """Opens the file, reads the header and checks that it holds one picture of a size that can be decoded."""
    with _named(file):
        stream = open_regular(file.content) if isinstance(file.content, str) else io.BytesIO(read(file))
    with stream:
        with _named(file):
            opened = Image.open(stream, formats=FORMATS)
            single = _is_single(opened)
        if not single:
            raise DataError(
                f"{file.shown}: an animation, or several pages ({opened.format}); expected a single picture: save the "
                "one to use as a file of its own"
            )
        if opened.format == "TIFF" and not _is_complete(opened):
            raise DataError(f"{file.shown}: damaged image: it has data of fewer pixels than its size")
        yield opened


@contextlib.contextmanager
def _named(file: Encoded):
    """Converts errors of opening to DataError."""
    listed = f" (listed in {file.listed})" if file.listed else ""
    problem = f"{file.shown}: not an image that can be opened"
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"missing file {file.shown}{listed}") from None
    except UnidentifiedImageError:  # Its text names an object in memory.
        raise DataError(f"{problem}: unknown format; expected {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise DataError(f"{problem}: too large; expected at most {_MOST_PIXELS} pixels") from None
    except OSError as error:
        raise DataError(f"{problem}: {error.strerror or error}{listed}") from None
    except Exception as error:  # Pillow raises many types for damaged files.
        raise DataError(f"{problem}: {error}") from None


def _is_single(opened: Image.Image) -> bool:
    """Whether there is one picture; further ones of a camera (MPO) and smaller copies in a TIFF do not count."""
    if opened.format == "MPO" or not getattr(opened, "is_animated", False):
        return True
    if opened.format != "TIFF":
        return False
    try:
        for page in range(1, _MOST_PAGES):
            opened.seek(page)
            if not opened.tag_v2.get(_SUBFILE_TYPE, 0) & _REDUCED:
                return False
    except EOFError:
        opened.seek(0)
        return True
    return False


def _is_complete(opened: Image.Image) -> bool:
    """Whether the strips or tiles of a TIFF cover it; Pillow would leave the rest black."""
    right, bottom = (max((tile.extents[side] for tile in opened.tile), default=0) for side in (2, 3))
    return right * bottom >= opened.width * opened.height  # Before the orientation, which may swap width and height.


def _load(opened: Image.Image, where: str) -> Image.Image:
    """Decodes the pixels and applies the EXIF orientation."""
    rotated, known = _orientation(opened) != 1, "exif" in opened.info
    if opened.format == "PNG":
        _check_png(opened.fp, where)
    try:
        opened.load()
    except Exception as error:  # Pillow raises many types for damaged files.
        raise DataError(f"{where}: damaged image, cannot be decoded: {error}") from None
    if not known and "exif" in opened.info:
        raise DataError(f"{where}: PNG with EXIF data after the pixels, which few programs read; save it again")
    return ImageOps.exif_transpose(opened) if rotated else opened


def _check_png(stream: BinaryIO, where: str) -> None:
    """Raises DataError for a chunk without its checksum: Pillow does not compare those of the pixels."""
    position = stream.tell()
    stream.seek(len(_PNG))
    while len(header := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        content, checksum = stream.read(length), stream.read(4)
        if len(checksum) == 4 and zlib.crc32(content, zlib.crc32(kind)) != int.from_bytes(checksum):
            raise DataError(f"{where}: damaged image: a part of it ({printable(repr(kind))}) is not as it was written")
    stream.seek(position)


def _orientation(opened: Image.Image) -> int:
    if opened.format == "TIFF":
        return 1  # Pillow applies it: size and pixels are oriented.
    try:
        # Not opened.getexif(), which decodes the whole file of a PNG.
        value = Image.Image.getexif(opened).get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1  # Unreadable for any program.
    return value if value in range(1, 9) else 1


def _size(opened: Image.Image) -> tuple[int, int]:
    return (opened.width, opened.height) if _orientation(opened) >= 5 else (opened.height, opened.width)


def _raw_mode(opened: Image.Image) -> str:
    """Returns Pillow's name of the stored pixel format, such as "L;4" for 4-bit gray; "" if it has none."""
    arguments = opened.tile[0].args if opened.tile else ""
    first = arguments if isinstance(arguments, str) or not arguments else arguments[0]
    return first if isinstance(first, str) else ""


def _check_image(opened: Image.Image, where: str) -> None:
    if opened.mode.startswith(("I", "F")):
        raise DataError(
            f"{where}: image of mode {opened.mode!r} (16 or more bits per pixel, or floats); expected 8 bits per "
            "channel: the value of white is unknown, so scale it to 0..255 and save it as 8-bit gray"
        )
    if opened.mode not in _IMAGE_MODES:
        raise DataError(f"{where}: image of mode {opened.mode!r}; expected RGB or gray, 8 bits per channel")
    if opened.mode == "CMYK" and opened.format == "JPEG" and "adobe" not in opened.info:
        raise DataError(
            f"{where}: CMYK JPEG without Adobe's marker, so that it may or may not be inverted; save it as RGB"
        )


def _check_opaque(oriented: Image.Image, where: str) -> None:
    alpha = np.asarray(oriented.convert("RGBA"))[..., 3]
    if alpha.min() < 255:
        raise DataError(
            f"{where}: image of mode {oriented.mode!r} with transparency in {(alpha < 255).mean():.1%} of the pixels, "
            "whose color is undefined; save it as RGB without transparency"
        )


def _check_mask(opened: Image.Image, where: str, colors: bool) -> None:
    ids = "expected class ids in 8-bit or 16-bit gray, 1 bit, or a palette (PNG)"
    if opened.format in ("JPEG", "MPO"):
        raise DataError(f"{where}: mask in JPEG, which changes values on saving; expected a PNG")
    if colors and opened.mode not in _COLOR_MODES:
        raise DataError(
            f"{where}: mask of mode {opened.mode!r}; config.data.label_map expects colors, 8 bits per channel"
        )
    if not colors and opened.mode in ("RGB", "RGBA"):
        raise DataError(
            f"{where}: mask of mode {opened.mode!r}; {ids}. If its colors stand for classes, set "
            "config.data.label_map to a file with lines `RED GREEN BLUE CLASS`"
        )
    if not colors and opened.mode not in _ID_MODES:
        raise DataError(f"{where}: mask of mode {opened.mode!r}; {ids}")
    # Pillow changes values: it stretches 2- and 4-bit gray to 0..255, inverts "L;I" and truncates 16-bit colors.
    stored = _raw_mode(opened)
    if stored in ("L;2", "L;4"):
        raise DataError(f"{where}: mask of {stored[-1]}-bit gray; {ids}")
    if stored.startswith(("L;", "1;")) or (opened.mode.startswith("RGB") and ";16" in stored):
        raise DataError(f"{where}: mask stored as {stored!r}, whose values decoding changes; {ids}")


def _ids(values: np.ndarray, where: str) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    values = values.astype(np.int32)
    if values.min() < 0 or values.max() >= MOST_IDS:
        raise DataError(f"{where}: mask values {values.min()}..{values.max()} found; expected 0..{MOST_IDS - 1}")
    return values
