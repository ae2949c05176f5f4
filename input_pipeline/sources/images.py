"""The images that a user points at: a file, a folder or a list."""

import os

from PIL import Image

from input_pipeline import split_lists
from input_pipeline.errors import DataError
from input_pipeline.sources.folder import ImagesSource

LIST_SUFFIX = ".txt"


def find_images(path: str, root: str = "") -> tuple[ImagesSource, list[str]]:
    """Opens the images of `path`.

    Args:
      path: an image; a folder, whose images and those of its sub-folders are taken in order; or a list, a .txt file
        of lines `image` or `image mask`.
      root: folder that the paths of a list are relative to; default the list's own.

    Returns:
      The source, and for each image its path relative to the folder, or as the list has it, or the file's name.

    Raises:
      DataError: nothing is there, a folder without an image, a list that cannot be used.
    """
    if os.path.isdir(path):
        names = images_below(path)
        if not names:
            raise DataError(f"{path}: no image in this folder; known suffixes: {' '.join(sorted(_suffixes()))}")
        return ImagesSource([os.path.join(path, name) for name in names], path), names
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file or folder")
    if path.endswith(LIST_SUFFIX):
        names = [entry.image for entry in split_lists.read_list(path, labeled=False)]
        folder = root or os.path.dirname(path)
        return ImagesSource([os.path.join(folder, name) for name in names], path), names
    return ImagesSource([path], "the command line"), [os.path.basename(path)]


def images_below(folder: str) -> list[str]:
    """Returns the paths of the images in a folder and its sub-folders, relative to it and sorted."""
    names = []
    for where, _, files in os.walk(folder, followlinks=True):
        names += [os.path.relpath(os.path.join(where, file), folder) for file in files]
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in _suffixes())


def _suffixes() -> set[str]:
    """Of the formats that Pillow reads and pictures come in."""
    formats = {"BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"}
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
