"""Sources of image files."""

import os
from collections.abc import Sequence

from input_pipeline.decode import Encoded
from input_pipeline.errors import DataError
from input_pipeline.labels import Labels
from input_pipeline.sources.encoded import EncodedSource
from input_pipeline.split_lists import Entry


class FolderSource(EncodedSource):
    """Image and mask files below a folder."""

    def __init__(self, root: str, entries: Sequence[Entry], where: str, labels: Labels | None):
        """Opens no file.

        Args:
          root: folder that the paths of the entries are relative to.
          entries: the images and masks.
          where: the list or folder that names the entries, for messages.
          labels: see `EncodedSource`; if not None, every entry names a mask.
        """
        super().__init__(len(entries), where, labels)
        self.root, self.entries = root, list(entries)

    def name(self, index: int) -> str:
        """Returns the path of the image as written in the list."""
        return self.entries[index].image

    def files(self, index: int) -> tuple[Encoded, Encoded | None]:
        """See `EncodedSource`."""
        entry = self.entries[index]
        return self._file(entry.image), None if self.labels is None else self._file(entry.mask)

    def _file(self, name: str) -> Encoded:
        path = os.path.join(self.root, name)
        return Encoded(path, path, self.where)


class ImagesSource(FolderSource):
    """Images without masks, for prediction; unreadable files are collected instead of raised.

    Attributes:
      errors: one DataError per unreadable file.
      readable: indices of the other files.
    """

    def __init__(self, paths: Sequence[str], where: str):
        """Reads the headers of the images at `paths`; `where` names the list or folder, for messages."""
        super().__init__("", [Entry(path, None) for path in paths], where, None)
        headers = self._read_headers()
        self.errors = [header for header in headers if isinstance(header, DataError)]
        self.readable = [index for index, header in enumerate(headers) if not isinstance(header, DataError)]
        self._sizes = [(0, 0) if isinstance(header, DataError) else header for header in headers]
