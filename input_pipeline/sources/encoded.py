"""Sources of encoded images and masks, whatever holds them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from input_pipeline import decode
from input_pipeline.decode import Encoded
from input_pipeline.errors import DataError
from input_pipeline.labels import Labels

_HEADER_THREADS = 32  # Reading a header is waiting for the disk or the network, not computing.
_REPORTED = 5  # Bad files named in one message.


class EncodedSource:
    """Decodes the records of a subclass, which says what they are called (`name`) and where they are (`files`)."""

    def __init__(self, length: int, where: str, labels: Labels | None):
        """Opens nothing.

        Args:
          length: number of records.
          where: what named them, for messages.
          labels: decodes the masks; None: records have no label, and no mask is opened even where there is one.
        """
        self._length, self.where, self.labels = length, where, labels
        self._sizes: Sequence[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """Returns the path of the image, as the user wrote it."""
        raise NotImplementedError

    def files(self, index: int) -> tuple[Encoded, Encoded | None]:
        """Returns the image and, if records have labels, the mask; reads neither."""
        raise NotImplementedError

    def size(self, index: int) -> tuple[int, int]:
        """Returns (H, W) of record `index`, from the headers, which are read once."""
        if self._sizes is None:
            self.check_headers()
        return tuple(int(side) for side in self._sizes[index])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Decodes a record, at the size of the file.

        Returns:
          "image", uint8 [H, W, 3], and with labels "label", class ids uint8 [H, W].

        Raises:
          DataError: a file is missing or damaged, image and mask differ in size, or the mask has values of no class.
        """
        image_file, mask_file = self.files(index)
        image = decode.image(image_file)
        if self.labels is None:
            return {"image": image}
        label = self.labels.decode(mask_file)
        check_sizes(image_file, image.shape[:2], mask_file, label.shape)
        return {"image": image, "label": label}

    def check_headers(self) -> None:
        """Checks that every record is there and that sizes and modes fit, reading headers only.

        Raises:
          DataError: naming the first bad files and their number.
        """
        results = self._read_headers()
        errors = [result for result in results if isinstance(result, DataError)]
        if errors:
            more = f"\n... {len(errors)} of the {len(self)} lines of {self.where}" if len(errors) > 1 else ""
            raise DataError("\n".join(map(str, errors[:_REPORTED])) + more)
        self._sizes = np.array(results, np.int32)

    def _read_headers(self) -> list[tuple[int, int] | DataError]:
        """The size of each record, or what is wrong with it."""
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


def check_sizes(image: Encoded, size: tuple[int, ...], mask: Encoded, mask_size: tuple[int, ...]) -> None:
    """Raises DataError when the sizes (H, W) of an image and its mask differ."""
    if size == mask_size:
        return
    turned = decode.orientation(image)
    hint = ""
    if turned >= 5 and mask_size == size[::-1]:
        hint = (
            f". The mask fits the image as stored, before its EXIF orientation ({turned}) turns it: turn the mask, or "
            "save the image anew, turned and without EXIF"
        )
    raise DataError(
        f"{mask.where}: mask of {mask_size[1]}x{mask_size[0]} pixels; expected {size[1]}x{size[0]}, the size of "
        f"{image.where}{hint}"
    )
