"""Files and lists damaged at random: either an error that names the file or list, or every record is read."""

import functools
import io
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from configs import defaults
from input_pipeline.errors import DataError
from input_pipeline.sources.open import open_sources
from tests.input_pipeline.own_images import CLASSES, save_image, save_mask

CASES = 500
LISTS_OF = {"labeled": "splits/s/labeled.txt", "unlabeled": "splits/s/unlabeled.txt", "val": "splits/val.txt"}


@pytest.fixture
def root(tmp_path):
    """A data set of 4 labeled, 3 unlabeled and 2 validation images."""
    root = tmp_path / "root"
    (root / "splits/s").mkdir(parents=True)
    lines = []
    for n in range(9):
        save_image(root / f"images/{n}.png", n)
        save_mask(root / f"masks/{n}.png", (n % 3, 255))
        lines.append(f"images/{n}.png masks/{n}.png\n")
    pixels = Image.open(root / "images/4.png")
    pixels.save(root / "images/4.jpg")
    lines[4] = "images/4.jpg\n"
    for path, chosen in zip(LISTS_OF.values(), (lines[:4], lines[4:7], lines[7:]), strict=True):
        (root / path).write_text("".join(chosen))
    return root


def _encoded(rng, mode: str, size: tuple[int, int], format_: str) -> bytes:
    pixels = rng.integers(256, size=(size[1], size[0], 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format_)
    return buffer.getvalue()


def _flip(content: bytes, rng) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(len(changed), size=rng.integers(1, 6)):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


# Damages to the bytes of a file: (bytes, generator) -> bytes.
FILES = {
    "truncate": lambda content, rng: content[: rng.integers(len(content))],
    "flip": _flip,
    "noise": lambda content, rng: rng.bytes(int(rng.integers(1, 200))),
    "insert": lambda content, rng: content[: (at := int(rng.integers(len(content))))] + rng.bytes(9) + content[at:],
    "text": lambda content, rng: b"<html><body>404 Not Found</body></html>",
    "empty": lambda content, rng: b"",
    "size": lambda content, rng: _encoded(rng, "L", (int(rng.integers(1, 12)), 8), "PNG"),
    "mode": lambda content, rng: _encoded(rng, str(rng.choice(["1", "L", "P", "LA", "RGBA", "RGB"])), (8, 8), "PNG"),
    "deep": lambda content, rng: _encoded(rng, str(rng.choice(["I", "F", "CMYK", "I;16"][:3])), (8, 8), "TIFF"),
    "jpeg": lambda content, rng: _encoded(rng, str(rng.choice(["L", "RGB", "CMYK"])), (8, 8), "JPEG"),
    "gif": lambda content, rng: _encoded(rng, "P", (8, 8), "GIF"),
}


def damage_file(root, rng) -> list[str]:
    """Damages a file; returns the names that an error may contain: the file."""
    folder = root / str(rng.choice(["images", "masks"]))
    path = folder / str(rng.choice(sorted(os.listdir(folder))))
    kind = str(rng.choice([*FILES, "delete", "directory", "loop"]))
    if kind in FILES:
        path.write_bytes(FILES[kind](path.read_bytes(), rng))
        return [str(path)]
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    return [str(path)]


def _shuffled(lines, rng):
    return [" ".join(rng.permutation(line.split())) for line in lines]


def _one(change, lines, rng):
    at = int(rng.integers(len(lines)))
    return [*lines[:at], change(lines[at]), *lines[at + 1 :]]


# Damages to the lines of a list: (lines, generator) -> lines.
LISTS = {
    "shuffled columns": _shuffled,
    "empty": lambda lines, rng: [],
    "doubled": lambda lines, rng: lines * 2,
    **{
        name: functools.partial(_one, change)
        for name, change in {
            "extra column": lambda line: f"{line} more.png",
            "first column": lambda line: line.split()[0],
            "blank line": lambda line: f"{line}\n \t ",
            "nonexistent": lambda line: line.replace("images", "pictures"),
            "tab": lambda line: line.replace(" ", "\t"),
            "odd name": lambda line: "imagés/\U0001f600\u2028.png " + line,
            "null": lambda line: "images/\0.png masks/0.png",
            "long": lambda line: "a" * 5000 + ".png masks/0.png",
            "quotes": lambda line: '"images/0.png" "masks/0.png"',
            "root itself": lambda line: ". .",
            "above": lambda line: "../../../../etc/passwd masks/0.png",
        }.items()
    },
}
# Damages to the bytes of a list: (bytes, root, generator) -> bytes.
TEXTS = {
    "bytes": lambda text, root, rng: text[: (at := int(rng.integers(len(text))))] + b"\xff\xfe" + text[at:],
    "bom": lambda text, root, rng: b"\xef\xbb\xbf" + text,
    "utf-16": lambda text, root, rng: text.decode().encode("utf-16"),
    "crlf": lambda text, root, rng: text.replace(b"\n", b"\r\n"),
    "no last line end": lambda text, root, rng: text.rstrip(),
    "absolute": lambda text, root, rng: text.replace(b"images/", os.fsencode(root) + b"/images/"),
    "flip": lambda text, root, rng: _flip(text, rng),
}


def damage_list(root, rng) -> list[str]:
    """Damages a list; returns the names that an error may contain: the list and the files in it."""
    path = root / str(rng.choice(list(LISTS_OF.values())))
    kind = str(rng.choice([*LISTS, *TEXTS, "delete", "directory"]))
    if kind in LISTS:
        path.write_text("".join(f"{line}\n" for line in LISTS[kind](path.read_text().splitlines(), rng)))
    elif kind in TEXTS:
        path.write_bytes(TEXTS[kind](path.read_bytes(), root, rng))
    else:
        path.unlink()
        if kind == "directory":
            path.mkdir()
        return [str(path)]
    columns = path.read_bytes().decode(errors="replace").split()
    return [str(path), *(os.path.join(root, column) for column in columns)]


def lines_of(root, split: str) -> int:
    """Returns the number of nonblank lines of a list, counted independently."""
    text = (root / LISTS_OF[split]).read_bytes().decode("utf-8-sig")
    return sum(bool(line.strip()) for line in text.splitlines())


def read_all(config) -> dict[str, int]:
    """Reads every record; returns the number of records by split."""
    sources = open_sources(config)
    for name, source in sources._asdict().items():
        for index in range(len(source)):
            record = source[index]
            assert record["image"].dtype == np.uint8 and record["image"].shape == (*source.size(index), 3)
            if name != "unlabeled":
                assert record["label"].shape == source.size(index)
                assert set(np.unique(record["label"])) <= {0, 1, 2, 255}
    return {name: len(source) for name, source in sources._asdict().items()}


def restore(path, content: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@pytest.mark.slow
def test_damaged_data_is_named_or_read(root):
    config = defaults.get_config()
    config.data.update({"root": str(root), "split": "s", "classes": CLASSES})
    contents = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    clean = 0
    for case in range(CASES):
        rng = np.random.default_rng(case)
        names = (damage_file if case % 2 else damage_list)(root, rng)
        try:
            counts = read_all(config)
        except DataError as error:
            assert any(name in str(error) for name in names), (case, str(error))
        else:
            clean += 1
            assert counts == {split: lines_of(root, split) for split in LISTS_OF}
        damaged = pathlib.Path(names[0])
        restore(damaged, contents[damaged])
    assert 0.1 * CASES < clean < 0.6 * CASES  # Both outcomes are frequent.
