"""Random-access sources of images: a record is {"image": uint8 [H, W, 3] RGB, "label": uint8 [H, W]}.

Sources are picklable (worker processes get a copy) and safe to read from many threads.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import simplejpeg
from PIL import Image

from input_pipeline import split_lists
from input_pipeline.errors import DataError
from input_pipeline.shapes import SHAPES_CLASSES, ShapesSource

SOURCES = ("folder", "shapes")
MASK_MODES = ("L", "P")
_HEADER_THREADS = 32  # Reading a header is waiting for the disk or the network, not computing.
_REPORTED = 5  # Bad files named in one message.
# What Pillow raises for a file that is not, or not wholly, an image.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class Source(Protocol):
    """What the pipelines read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns {"image": uint8 [H, W, 3], "label": uint8 [H, W]}; an unlabeled source has no "label"."""

    def name(self, index: int) -> str:
        """Returns the path of the image, as the user wrote it."""

    def size(self, index: int) -> tuple[int, int]:
        """Returns (H, W) without decoding the image."""


class Sources(NamedTuple):
    """The three sources of a run. `unlabeled` is one pass of an epoch, whatever the method reads from it."""

    labeled: Source
    unlabeled: Source
    val: Source


def digest(source: Source) -> str:
    """Returns a digest of the names of the images and of their order, which is what batches depend on."""
    names = hashlib.sha256()
    for index in range(len(source)):
        names.update(source.name(index).encode() + b"\n")
    return names.hexdigest()


class FolderSource:
    """Images, and their masks, named by a text list."""

    def __init__(self, root: str, list_path: str, num_classes: int, ignore: int, labeled: bool):
        """Reads the list; opens no image.

        Args:
          root: folder that the paths in the list are relative to.
          list_path: the list; see `split_lists.read_list`.
          num_classes: masks hold the class ids 0 .. num_classes - 1.
          ignore: and this value.
          labeled: whether records have a label. Where not, no mask is opened, even if the list names some.

        Raises:
          DataError: `root` is not a folder, the list cannot be used, or the ids do not fit in 8 bits.
        """
        if not os.path.isdir(root):
            raise DataError(f"the data root {root!r} is not a folder (config.data.root)")
        if not (0 < num_classes <= 256 and 0 <= ignore <= 255):
            raise DataError(f"{num_classes} classes and ignored value {ignore} do not fit in 8-bit masks")
        self.root, self.list_path, self.labeled = root, list_path, labeled
        self._entries = split_lists.read_list(list_path, labeled)
        self._num_classes, self._ignore = num_classes, ignore
        self._allowed = np.zeros(256, bool)
        self._allowed[:num_classes] = True
        self._allowed[ignore] = True
        self._sizes = None

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """Returns the image's path as it stands in the list."""
        return self._entries[index].image

    def size(self, index: int) -> tuple[int, int]:
        """Returns (H, W) of record `index`, from the headers."""
        if self._sizes is None:
            self.check_headers()
        return tuple(int(side) for side in self._sizes[index])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Decodes a record, at the size of the file.

        Raises:
          DataError: a file is missing or damaged, image and mask differ in size, or the mask is not one of class ids.
        """
        entry = self._entries[index]
        image_path = os.path.join(self.root, entry.image)
        with self._open(image_path) as file:
            _check_image_mode(file, image_path)
            image = _rgb(file, image_path)
        if not self.labeled:
            return {"image": image}
        mask_path = os.path.join(self.root, entry.mask)
        with self._open(mask_path) as file:
            _check_mask_mode(file, mask_path)
            label = np.asarray(_decode(file, mask_path))
        _check_sizes(image_path, image.shape[:2], mask_path, label.shape)
        self._check_values(label, mask_path)
        return {"image": image, "label": label}

    def check_headers(self) -> None:
        """Checks that every listed file exists and that sizes and modes fit, reading headers only.

        Raises:
          DataError: naming the first bad files and their number.
        """
        results = self._read_headers()
        errors = [result for result in results if isinstance(result, DataError)]
        if errors:
            more = f"\n... {len(errors)} of the {len(self)} lines of {self.list_path}" if len(errors) > 1 else ""
            raise DataError("\n".join(map(str, errors[:_REPORTED])) + more)
        self._sizes = np.array(results, np.int32)

    def _read_headers(self) -> list[tuple[int, int] | DataError]:
        """The size of each record, or what is wrong with it."""
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            return list(pool.map(self._check_header, range(len(self))))

    def _check_header(self, index: int) -> tuple[int, int] | DataError:
        entry = self._entries[index]
        image_path = os.path.join(self.root, entry.image)
        try:
            with self._open(image_path) as file:
                _check_image_mode(file, image_path)
                size = file.height, file.width
            if self.labeled:
                mask_path = os.path.join(self.root, entry.mask)
                with self._open(mask_path) as file:
                    _check_mask_mode(file, mask_path)
                    _check_sizes(image_path, size, mask_path, (file.height, file.width))
        except DataError as error:
            return error
        return size

    def _open(self, path: str) -> Image.Image:
        try:
            return Image.open(path)
        except FileNotFoundError:
            raise DataError(f"missing file {path} (listed in {self.list_path})") from None
        except _DECODE_ERRORS as error:
            raise DataError(f"{path}: not an image that can be opened: {error}") from None

    def _check_values(self, label: np.ndarray, path: str) -> None:
        good = self._allowed[label]
        if not good.all():
            values = ", ".join(map(str, np.unique(label[~good])[:10]))
            raise DataError(
                f"{path}: mask values {values} found; expected class ids 0..{self._num_classes - 1} "
                f"({self._num_classes} classes) or {self._ignore} (ignored)"
            )


class ImagesSource(FolderSource):
    """Images alone, for prediction: files that cannot be read are told, not raised."""

    def __init__(self, paths: Sequence[str], where: str):
        """Reads the headers of the images at `paths`; `where` says in messages who named them."""
        self.root, self.list_path, self.labeled = "", where, False
        self._entries = [split_lists.Entry(path, None) for path in paths]
        headers = self._read_headers()
        self.errors = [header for header in headers if isinstance(header, DataError)]
        self.readable = [index for index, header in enumerate(headers) if not isinstance(header, DataError)]
        self._sizes = [(0, 0) if isinstance(header, DataError) else header for header in headers]


def _decode(file: Image.Image, path: str) -> Image.Image:
    try:
        file.load()
    except _DECODE_ERRORS as error:
        raise DataError(f"{path}: damaged image, cannot be decoded: {error}") from None
    return file


def _rgb(file: Image.Image, path: str) -> np.ndarray:
    """Decodes to uint8 [H, W, 3]; JPEGs by libjpeg-turbo without Pillow around it, which takes half as long again."""
    if file.format == "JPEG" and file.mode == "RGB":
        # What it refuses, Pillow may take or explain.
        with contextlib.suppress(ValueError), open(path, "rb") as content:
            return simplejpeg.decode_jpeg(content.read(), "RGB")
    return np.asarray(_decode(file, path).convert("RGB"))


def _check_image_mode(file: Image.Image, path: str) -> None:
    # Integer and float images have no agreed range; Pillow would clip them to 255.
    if file.mode.startswith(("I", "F")):
        raise DataError(f"{path}: image of mode {file.mode!r}; expected 8 bits a channel")


def _check_mask_mode(file: Image.Image, path: str) -> None:
    expected = f"expected an 8-bit single-channel or palette image of class ids (mode {' or '.join(MASK_MODES)})"
    if file.mode not in MASK_MODES:
        raise DataError(f"{path}: mask of mode {file.mode!r}; {expected}")
    # Pillow stretches 2- and 4-bit grey to 0..255, which would change the class ids.
    raw_mode = file.tile[0].args if file.tile else None
    if raw_mode in ("L;2", "L;4"):
        raise DataError(f"{path}: mask of {raw_mode[-1]}-bit grey; {expected}")


def _check_sizes(image_path: str, image: tuple[int, ...], mask_path: str, mask: tuple[int, ...]) -> None:
    if image != mask:
        raise DataError(
            f"{mask_path}: mask of {mask[1]}x{mask[0]} pixels; expected {image[1]}x{image[0]}, the size of {image_path}"
        )


def open_sources(config) -> Sources:
    """Opens the labeled, unlabeled and validation sources of a run and checks all file headers.

    Args:
      config: the whole configuration; `config.data` says where the data are.

    Raises:
      DataError: unknown source, or data that cannot be used.
    """
    data = config.data
    if data.source not in SOURCES:
        raise DataError(f"config.data.source is {data.source!r}; known: {', '.join(SOURCES)}")
    return _open_shapes(data) if data.source == "shapes" else _open_folder(data)


def _open_folder(data) -> Sources:
    if not data.root:
        raise DataError("config.data.root is not set: the folder that the paths in the lists are relative to")
    if not data.classes:
        raise DataError("config.data.classes is empty; expected the class names in the order of the ids in the masks")
    root = os.path.abspath(os.path.expanduser(data.root))
    if not os.path.isdir(root):
        raise DataError(f"the data root {root!r} is not a folder (config.data.root)")
    lists = split_lists.find_split(root, data.splits, data.split)
    classes = len(data.classes)
    sources = Sources(
        labeled=FolderSource(root, lists.labeled, classes, data.ignore, labeled=True),
        unlabeled=FolderSource(root, lists.unlabeled, classes, data.ignore, labeled=False),
        val=FolderSource(root, lists.val, classes, data.ignore, labeled=True),
    )
    for source in sources:
        source.check_headers()
    return sources


def _open_shapes(data) -> Sources:
    if tuple(data.classes) != SHAPES_CLASSES:
        raise DataError(f"config.data.classes is {tuple(data.classes)}; the generated shapes have {SHAPES_CLASSES}")
    shapes = data.shapes
    if not 0 < shapes.labeled <= shapes.unlabeled or shapes.val < 1:
        raise DataError(
            f"config.data.shapes: labeled {shapes.labeled}, unlabeled {shapes.unlabeled}, val {shapes.val}; "
            "expected 1 <= labeled <= unlabeled and val >= 1"
        )
    return Sources(
        labeled=ShapesSource(shapes.size, shapes.labeled, shapes.seed, part="train", labeled=True),
        unlabeled=ShapesSource(shapes.size, shapes.unlabeled, shapes.seed, part="train", labeled=False),
        val=ShapesSource(shapes.size, shapes.val, shapes.seed, part="val", labeled=True),
    )
