"""Base of the sources that decode images and masks."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from input_pipeline import decode
from input_pipeline.decode import Encoded
from input_pipeline.errors import DataError, first_messages, first_names
from input_pipeline.labels import Labels

_HEADER_THREADS = 32  # Reading a header waits for the disk or the network and computes little.
_DECODE_THREADS = 16


class EncodedSource:
    """Decodes records; a subclass defines their names (`name`) and their encoded files (`files`)."""

    def __init__(self, length: int, where: str, labels: Labels | None):
        """Opens nothing.

        Args:
          length: number of records.
          where: the list or folder that names the records, for messages.
          labels: decodes the masks; None for records without label, whose masks, if any, are not opened.
        """
        self._length, self.where, self.labels = length, where, labels
        self._sizes: Sequence[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """Returns the path of the image as the user wrote it."""
        raise NotImplementedError

    def files(self, index: int) -> tuple[Encoded, Encoded | None]:
        """Returns the encoded image and, if records have labels, the mask; reads neither."""
        raise NotImplementedError

    def size(self, index: int) -> tuple[int, int]:
        """Returns (H, W) of record `index` from the headers, which are read once."""
        if self._sizes is None:
            self.check_headers()
        return tuple(int(side) for side in self._sizes[index])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Decodes a record at its full size.

        Returns:
          {"image": uint8 [H, W, 3]}, and "label", class ids uint8 [H, W], if the source has labels.

        Raises:
          DataError: a file is missing or damaged, image and mask differ in size, or the mask has values without class.
        """
        image_file, mask_file = self.files(index)
        image = decode.image(image_file)
        if self._sizes is not None and image.shape[:2] != self.size(index):
            (height, width), (rows, columns) = self.size(index), image.shape[:2]
            raise DataError(f"{image_file.shown}: {columns}x{rows} pixels; it had {width}x{height} when it was opened")
        if self.labels is None:
            return {"image": image}
        label = self.labels.decode(mask_file)
        check_sizes(image_file, image.shape[:2], mask_file, label.shape)
        return {"image": image, "label": label}

    def label(self, index: int) -> np.ndarray:
        """Decodes the mask of a record alone, uint8 [H, W]; raises DataError for one that cannot be used."""
        return self.labels.decode(self.files(index)[1])

    def check_headers(self) -> None:
        """Checks from the headers alone that every record exists and that sizes and modes fit.

        Raises:
          DataError: bad files; the message names the first ones and their number.
        """
        results = self._read_headers()
        self._raise_first(results)
        self._sizes = np.array(results, np.int32)

    def check_records(self, most: int, progress: Callable[[int], None]) -> str:
        """See the function `check_records`."""
        indices = range(0, len(self), -(-len(self) // (most or len(self))))

        def is_empty(index: int) -> bool | DataError:
            try:
                record = self[index]
            except DataError as error:
                return error
            return "label" in record and bool((record["label"] == self.labels.ignore).all())

        results = []
        with ThreadPoolExecutor(_DECODE_THREADS) as pool:
            for result in pool.map(is_empty, indices):
                results.append(result)
                progress(1)
        self._raise_first(results)
        empty = [self.name(index) for index in itertools.compress(indices, results)]
        if not empty:
            return ""
        return (
            f"{self.where}: every pixel is ignored in the masks of {len(empty)} of the {len(results)} images that were "
            f"checked, which teach and score nothing: {first_names(empty)}"
        )

    def _raise_first(self, results: Sequence) -> None:
        """Raises a DataError that names the first of those among `results`, and their number."""
        errors = [result for result in results if isinstance(result, DataError)]
        if errors:
            raise DataError(first_messages(errors, f"of the {len(self)} images of {self.where}"))

    def _read_headers(self) -> list[tuple[int, int] | DataError]:
        """Returns the size of each record, or its error."""
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            return list(pool.map(self._read_header, range(len(self))))

    def _read_header(self, index: int) -> tuple[int, int] | DataError:
        try:
            image, mask = self.files(index)
            size = decode.image_size(image)
            if self.labels is not None:
                check_sizes(image, size, mask, self.labels.size(mask))
        except DataError as error:
            return error
        return size


def check_records(source, most: int = 0, progress: Callable[[int], None] = lambda done: None) -> str:
    """Decodes images and masks of a source once, so that what cannot be read is known before training.

    Args:
      source: a `sources.open.Source`; of one that decodes no files nothing is checked.
      most: greatest number of images to decode, spread over the source; 0: all.
      progress: called with the number of further images that were decoded.

    Returns:
      A warning that names masks without a pixel of any class, or "".

    Raises:
      DataError: bad files; the message names the first ones and their number.
    """
    return source.check_records(most, progress) if isinstance(source, EncodedSource) else ""


def check_sizes(image: Encoded, size: tuple[int, ...], mask: Encoded, mask_size: tuple[int, ...]) -> None:
    """Raises DataError if the sizes (H, W) of an image and its mask differ."""
    if size == mask_size:
        return
    orientation = decode.orientation(image)
    hint = ""
    if orientation >= 5 and mask_size == size[::-1]:
        hint = (
            f". The mask fits the image as stored, before its EXIF orientation ({orientation}) is applied: rotate the "
            "mask, or save the image again, rotated and without EXIF"
        )
    raise DataError(
        f"{mask.shown}: mask of {mask_size[1]}x{mask_size[0]} pixels; expected {size[1]}x{size[0]}, the size of "
        f"{image.shown}{hint}"
    )
