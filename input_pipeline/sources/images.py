"""Images to predict: a file, a folder or a list."""

import os

from input_pipeline import split_lists
from input_pipeline.errors import DataError
from input_pipeline.layout import IMAGE_SUFFIXES, images_below
from input_pipeline.sources.folder import ImagesSource
from input_pipeline.split_lists import LIST_SUFFIX


def find_images(path: str, root: str = "") -> tuple[ImagesSource, list[str]]:
    """Opens the images of `path`.

    Args:
      path: an image; a folder, for its images and those of its sub-folders, sorted; or a list, a .txt file of lines
        `image` or `image mask`.
      root: folder that the paths of a list are relative to; default the list's own.

    Returns:
      The source, and the name of each image: its path relative to the folder, or as in the list, or its file name.

    Raises:
      DataError: nothing is there, a folder without an image, a list that cannot be used.
    """
    if os.path.isdir(path):
        names = images_below(path)
        if not names:
            raise DataError(f"{path}: no image in this folder; known suffixes: {' '.join(IMAGE_SUFFIXES)}")
        return ImagesSource([os.path.join(path, name) for name in names], path), names
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file or folder")
    if path.endswith(LIST_SUFFIX):
        names = [entry.image for entry in split_lists.read_list(path, labeled=False)]
        folder = root or os.path.dirname(path)
        return ImagesSource([os.path.join(folder, name) for name in names], path), names
    return ImagesSource([path], "the command line"), [os.path.basename(path)]
