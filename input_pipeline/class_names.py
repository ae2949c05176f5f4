"""Class names: those of the generated shapes, and of a file. Without NumPy, so that config files load at once."""

from input_pipeline.errors import DataError
from input_pipeline.files import CONTROL_CHARACTER, read_text

SHAPES_CLASSES = ("background", "disk", "rectangle", "triangle", "ring", "cross")


def read_class_names(path: str) -> tuple[str, ...]:
    """Reads a file with one class name per line, in the order of the ids in the masks, from 0.

    Raises:
      DataError: no such file, or one that does not name 2 to 255 different classes.
    """
    expected = "expected the names of the classes, one per line, in the order of the ids in the masks, from 0"
    try:
        text = read_text(path, "text").rstrip()
    except FileNotFoundError:
        raise DataError(f"missing file {path}; {expected}") from None
    names = [line.strip() for line in text.split("\n")] if text else []
    if not 2 <= len(names) <= 255:
        raise DataError(f"{path}: {len(names)} names; {expected}: 2 to 255 names")
    if "" in names:  # Skipping it would shift the ids of the classes below it.
        raise DataError(f"{path}:{names.index('') + 1}: an empty line; {expected}")
    for number, name in enumerate(names, 1):
        if CONTROL_CHARACTER.search(name):
            raise DataError(f"{path}:{number}: '{name}' has control characters; {expected}")
    repeated = next((number for number, name in enumerate(names, 1) if name in names[: number - 1]), None)
    if repeated:
        raise DataError(f"{path}:{repeated}: {names[repeated - 1]!r} a second time; {expected}")
    return tuple(names)
