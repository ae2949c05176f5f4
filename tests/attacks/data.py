"""Attacks on the files of a data set: lists, images, masks, label maps, names of classes."""

import io
import os
import pathlib
import random
import struct
import zlib

import numpy as np
from PIL import Image

from input_pipeline.errors import printable
from tests.attacks import damage, fixtures
from tests.attacks.attack import Attack
from tests.attacks.fixtures import Place
from tests.attacks.modes import command

_LISTS = {"splits/s/labeled.txt": "labeled", "splits/s/unlabeled.txt": "unlabeled", "splits/val.txt": "val"}


def generate(place: Place, rng: random.Random) -> Attack:
    """Damages a file of the data set."""
    kind = rng.choice([_list, _list, _image, _image, _mask, _mask, _label_map, _classes, _tree])
    return kind(place, rng, rng.choice(["check", "check", "eval", "eval", "train"]))


def _attack(
    place: Place, mode: str, name: str, culprits: tuple[str, ...], verify, extra: tuple[str, ...] = ()
) -> Attack:
    """Makes the attack; `verify` takes the check of the normal result and the standard output."""
    workdir = place.copy("run") if mode == "eval" else place.out / "new"
    normal = command(place, mode, workdir)
    argv = normal.argv if mode != "train" else ["--mode=train", *place.config(train__steps=1), f"--workdir={workdir}"]

    def check(stdout: str) -> str:
        wrong = normal.verify(stdout) if mode == "eval" else ""
        return verify(wrong, stdout)

    return Attack(name, mode, [*argv, *extra], culprits, (*normal.outputs, workdir), check)


def _refused(wrong: str, stdout: str) -> str:
    return "accepted"


def _whole(wrong: str, stdout: str) -> str:
    """Accepts a file whose last bytes, which are cut off, are no pixels."""
    return "accepted" if wrong else ""


def _same(wrong: str, stdout: str) -> str:
    return wrong


def _other(reason: str):
    return lambda wrong, stdout: f"other: {reason}" if wrong or reason.startswith("valid") else ""


def _is_read(mode: str, split: str) -> bool:
    """Returns whether a mode opens a split."""
    return mode != "eval" or split == "val"


# Lists.


def _utf16(text: str, rng) -> bytes:
    return text.encode("utf-16")


_SAME_LISTS = {
    "crlf": lambda text, rng: text.replace("\n", "\r\n").encode(),
    "byte order mark": lambda text, rng: b"\xef\xbb\xbf" + text.encode(),
    "tabs": lambda text, rng: text.replace(" ", "\t").encode(),
    "trailing tabs": lambda text, rng: text.replace("\n", "\t\n").encode(),
    "trailing blanks": lambda text, rng: text.replace("\n", "  \n").encode(),
    "blank lines": lambda text, rng: text.replace("\n", "\n\n").encode(),
    "no last line end": lambda text, rng: text.rstrip("\n").encode(),
}
_BAD_LISTS = {
    "utf-16": _utf16,
    "not utf-8": lambda text, rng: b"\xff\xfe" + text.encode(),
    "latin-1 name": lambda text, rng: text.encode() + "images/é.png masks/é.png\n".encode("latin-1"),
    "NUL": lambda text, rng: text.encode() + b"images/\0.png masks/0.png\n",
    "empty list": lambda text, rng: b"",
    "blanks alone": lambda text, rng: b" \n\t\n",
    "nonexistent": lambda text, rng: text.encode() + b"images/99.png masks/99.png\n",
    "long name": lambda text, rng: b"a" * 5000 + b".png masks/0.png\n",
    "three columns": lambda text, rng: text.replace("\n", " masks/0.png more\n").encode(),
    "folders": lambda text, rng: b"images masks\n",
    "root itself": lambda text, rng: b". .\n",
    "binary": lambda text, rng: rng.randbytes(300),
    "one line of 10 MB": lambda text, rng: b"x" * 10_000_000,
    "escape codes": lambda text, rng: b"images/\x1b[31m.png masks/\x1b[0m.png\n",
}
_LIST_FILES = {**damage.KINDS, "swapped": None, "outside": None, "another list's": None, "flipped": damage.flip_bit}


def _list(place: Place, rng: random.Random, mode: str) -> Attack:
    name = rng.choice(sorted(_LISTS))
    path, how = place.root / name, rng.choice([*_SAME_LISTS, *_BAD_LISTS, *_LIST_FILES])
    culprits, verify = (path.name, "images/", "masks/"), _refused
    if how in _SAME_LISTS:
        path.write_bytes(_SAME_LISTS[how](path.read_text(), rng))
        verify = _same
    elif how in _BAD_LISTS:
        path.write_bytes(_BAD_LISTS[how](path.read_text(), rng))
        culprits += ("images", "masks") if how in ("folders", "root itself") else ()
        if how == "root itself":
            culprits += (str(place.root),)
    elif how == "swapped":  # Images are no masks; an unlabeled mask is an image that can be read.
        path.write_text("".join(" ".join(reversed(line.split())) + "\n" for line in path.read_text().splitlines()))
        verify = _refused if "unlabeled" not in name else _same
    elif how == "outside":
        outside = place.scratch / "outside"
        (place.root / "images").rename(outside)
        path.write_text(path.read_text().replace("images/", "../outside/"))
        (place.root / "images").symlink_to(outside)
        verify = _same
    elif how == "another list's":
        path.write_text((place.root / rng.choice(sorted(_LISTS))).read_text())
        verify = lambda wrong, stdout: "other: valid images"  # noqa: E731
    else:
        _LIST_FILES[how](path, rng)
        verify = _other("valid names") if how == "flipped" else _refused
    if not _is_read(mode, _LISTS[name]):
        verify = _same
    return _attack(place, mode, f"{name} {how}", culprits, verify)


# Images and masks.


def encoded(array: np.ndarray, format_: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format_, **options)
    return buffer.getvalue()


def lying_png(width: int, height: int) -> bytes:
    """Returns a PNG whose header says another size than its few bytes hold."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def _animated(path: pathlib.Path, rng) -> None:
    frames = [Image.fromarray(np.full((*fixtures.SIZE, 3), 9 * n, np.uint8)) for n in range(3)]
    frames[0].save(path, "PNG", save_all=True, append_images=frames[1:])


def _eps(path: pathlib.Path, rng) -> None:
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 36 40\n(/tmp/x) run\nshowpage\n%%EOF\n")


def _write(content):
    return lambda path, rng: path.write_bytes(content(rng))


def _noise(rng, *shape: int) -> np.ndarray:
    return np.random.default_rng(rng.randrange(2**32)).integers(0, 256, shape, np.uint8)


_BAD_FILES = {
    "truncated": lambda path, rng: path.write_bytes(path.read_bytes()[: rng.randrange(len(path.read_bytes()))]),
    "empty": damage.empty,
    "noise": damage.noise,
    "page of HTML": _write(lambda rng: b"<html><body>404 Not Found</body></html>"),
    "huge header": _write(lambda rng: lying_png(60000, 60000)),
    "huge header, one row": _write(lambda rng: lying_png(2**31 - 1, 1)),
    "header of no pixels": _write(lambda rng: lying_png(0, 0)),
    "lying header": _write(lambda rng: lying_png(36, 40)),
    "floats": _write(lambda rng: encoded(_noise(rng, *fixtures.SIZE).astype(np.float32), "TIFF")),
    "an EPS": _eps,
    "an SVG": _write(lambda rng: b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="36" height="40"/></svg>'),
    "animated": _animated,
    "of another size": _write(lambda rng: encoded(_noise(rng, 12, 50, 3), "PNG")),
    **damage.KINDS,
}
_VALID_IMAGES = {
    "gray": lambda rng: encoded(_noise(rng, *fixtures.SIZE), "PNG"),
    "JPEG": lambda rng: encoded(_noise(rng, *fixtures.SIZE, 3), "JPEG"),
    "BMP": lambda rng: encoded(_noise(rng, *fixtures.SIZE, 3), "BMP"),
    "opaque": lambda rng: encoded(
        np.dstack([_noise(rng, *fixtures.SIZE, 3), np.full(fixtures.SIZE, 255, np.uint8)]), "PNG"
    ),
}


def _split_of(name: str) -> str:
    number = f"images/{pathlib.Path(name).name}"
    return "labeled" if number in fixtures.LABELED else "val" if number in fixtures.VAL else "unlabeled"


def _image(place: Place, rng: random.Random, mode: str) -> Attack:
    path = place.root / rng.choice([*fixtures.LABELED, *fixtures.UNLABELED, *fixtures.VAL])
    how = rng.choice([*_BAD_FILES, *_VALID_IMAGES, "bit flipped", "a link", "transparent"])
    split, verify = _split_of(path.name), _refused
    if how == "of another size" and split == "unlabeled":
        verify = _same  # An image without a mask has any size.
    if how == "a link":
        path.rename(place.scratch / "elsewhere.png")
        path.symlink_to(place.scratch / "elsewhere.png")
        verify = _same
    elif how == "transparent":
        path.write_bytes(encoded(_noise(rng, *fixtures.SIZE, 4), "PNG"))
    elif how in _VALID_IMAGES:
        path.write_bytes(_VALID_IMAGES[how](rng))
        verify = lambda wrong, stdout: "other: a valid image"  # noqa: E731
    elif how == "bit flipped":
        damage.flip_bit(path, rng)
        verify = lambda wrong, stdout: "other: a valid image" if _decodes(path) else _whole(wrong, stdout)  # noqa: E731
    else:
        _BAD_FILES[how](path, rng)
        if how == "truncated":
            verify = _whole
        if how == "animated":
            verify = lambda wrong, stdout: "other: told" if "frame" in stdout else "accepted"  # noqa: E731
    if mode == "train" and split == "unlabeled" and verify is _refused:
        verify = _other("valid for the supervised baseline, which does not decode it")
    if not _is_read(mode, split):
        verify = _same
    return _attack(place, mode, f"images/{path.name} ({split}) {how}", (path.name, "images/"), verify)


def _decodes(path: pathlib.Path) -> bool:
    """Returns whether Pillow decodes a PNG without complaint, its checksums included."""
    try:
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:
            image.load()
        return True
    except Exception:
        return False


_BAD_MASKS = {
    "value without a class": _write(lambda rng: encoded(np.full(fixtures.SIZE, 7, np.uint8), "PNG")),
    "colors": _write(lambda rng: encoded(_noise(rng, *fixtures.SIZE, 3), "PNG")),
    "a JPEG": _write(lambda rng: encoded(np.zeros(fixtures.SIZE, np.uint8), "JPEG")),
    "16 bits": _write(lambda rng: encoded(np.full(fixtures.SIZE, 999, np.uint16), "PNG")),
}


def _mask(place: Place, rng: random.Random, mode: str) -> Attack:
    name = rng.choice([*fixtures.LABELED, *fixtures.VAL]).replace("images", "masks")
    path, split, verify = place.root / name, _split_of(name), _refused
    how = rng.choice([*_BAD_FILES, *_BAD_MASKS, "all ignored", "other ids", "bit flipped", "a link"])
    if how == "all ignored":  # Legitimate for one image; with all labeled ones ignored no pixel has a label.
        alone = rng.random() < 0.3
        for each in [path] if alone else (place.root / "masks").iterdir():
            each.write_bytes(encoded(np.full(fixtures.SIZE, 255, np.uint8), "PNG"))
        how, split = (how, split) if alone else ("and all others ignored", "val")
        verify = lambda wrong, out: "other: told" if alone or "ignore" in out else "accepted without a word"  # noqa: E731
    elif how == "other ids":
        path.write_bytes(encoded(_noise(rng, *fixtures.SIZE) % 3, "PNG"))
        verify = lambda wrong, stdout: "other: a valid mask"  # noqa: E731
    elif how == "bit flipped":
        damage.flip_bit(path, rng)
        verify = lambda wrong, stdout: "other: a valid mask" if _decodes(path) else _whole(wrong, stdout)  # noqa: E731
    elif how == "a link":
        path.rename(place.scratch / "elsewhere.png")
        path.symlink_to(place.scratch / "elsewhere.png")
        verify = _same
    else:
        (_BAD_FILES | _BAD_MASKS)[how](path, rng)
        verify = _whole if how == "truncated" else verify
    if not _is_read(mode, split):
        verify = _same
    return _attack(place, mode, f"{name} ({split}) {how}", (path.name, "masks", "label"), verify)


# Label maps and names of classes.

_BAD_MAPS = {
    "empty": b"",
    "5000 digits": b"9" * 5000 + b" sky\n",
    "huge id": b"99999999999 sky\n",
    "negative": b"-1 sky\n",
    "deep JSON": b'{"0": ' + b"[" * 100_000,
    "a field of 200 kB": b'0,"' + b"x" * 200_000 + b'"\n',
    "unknown class": b"0 sky\n1 road\n2 cart\n",
    "two classes": b"0 sky\n0 road\n",
    "ids and colors": b"0 sky\n1 2 3 road\n",
    "no class": b"0\n1\n",
    "not utf-8": b"\xff\xfe\xfa sky\n",
    "NUL": b"0 sky\0\n1 road\n",
    "too few ids": b"0 sky\n",
    "binary": bytes(range(256)),
    "escape codes": b"0 \x1b[31msky\n",
    "superscript digits": "² sky\n".encode(),
    "other JSON": b'["sky", "road"]',
    "nan in JSON": b'{"NaN": "sky"}',
    "open quote": b'0,"sky\n1,road\n',
}
_SAME_MAPS = {
    "text": b"0 sky\n1 road\n2 car\n",
    "commas": b"0,sky\r\n1,road\r\n2,car\r\n",
    "json": b'{"0": "sky", "1": "road", "2": "car"}',
    "mark": b"\xef\xbb\xbf0 sky\n1 road\n2 car\n",
}


def _label_map(place: Place, rng: random.Random, mode: str) -> Attack:
    how = rng.choice([*_BAD_MAPS, *_SAME_MAPS, *damage.KINDS])
    path = place.root / ("map.json" if "json" in how.lower() else "map.csv" if "field" in how else "map.txt")
    path.write_bytes({**_BAD_MAPS, **_SAME_MAPS}.get(how, _SAME_MAPS["text"]))
    if how in damage.KINDS:
        damage.KINDS[how](path, rng)
    culprits = (path.name, "masks/")
    extra = (f"--config.data.label_map={path.name}",)
    return _attack(place, mode, f"label map {how}", culprits, _same if how in _SAME_MAPS else _refused, extra)


_BAD_CLASSES = {
    "empty": b"",
    "one": b"sky\n",
    "300 names": b"".join(b"c%d\n" % n for n in range(300)),
    "100 000 names": b"".join(b"c%d\n" % n for n in range(100_000)),
    "repeated": b"sky\nroad\nsky\n",
    "an empty line": b"sky\n\nroad\ncar\n",
    "not utf-8": b"sky\nroad\n\xff\xfe\n",
    "NUL": b"sky\nroad\ncar\0\n",
    "escape codes": b"sky\n\x1b[31mroad\ncar\n",
    "binary": bytes(range(1, 256)),
    "utf-16": "sky\nroad\ncar\n".encode("utf-16"),
}
_OTHER_CLASSES = {
    "mean": "mean\nroad\ncar\n",
    "a row of the table": "Mean IoU\nPixel accuracy\ncar\n",
    "markup": "<b>sky</b>\n<script>alert(1)</script>\ncar\n",
    "unicode": "café\n\U0001f600\nСлово\n",
    "from right to left": "\u202esky\nroad\ncar\n",
    "braces": "{sky}\n%s\n{{7*7}}\n",
    "a fourth": "sky\nroad\ncar\ntree\n",
    "long": f"{'x' * 3000}\nroad\ncar\n",
}


def _classes(place: Place, rng: random.Random, mode: str) -> Attack:
    how = rng.choice([*_BAD_CLASSES, *_OTHER_CLASSES, *damage.KINDS])
    path, verify = place.root / "classes.txt", _refused
    if how in damage.KINDS:
        damage.KINDS[how](path, rng)
    elif how in _BAD_CLASSES:
        path.write_bytes(_BAD_CLASSES[how])
    else:
        path.write_text(_OTHER_CLASSES[how])
        expected = _OTHER_CLASSES[how].splitlines()

        def verify(wrong: str, stdout: str) -> str:
            missing = [] if mode == "check" else [name for name in expected if printable(name) not in stdout]
            return f"no row for the class {missing[0]!r}" if missing else "other: classes of other names"

    return _attack(place, mode, f"classes {how}", ("classes",), verify)


# Trees of folders: images found by looking, not listed.


def _loop(root: pathlib.Path) -> str:
    (root / "images/a").symlink_to(root / "images")
    (root / "images/b").symlink_to(root / "images")
    return "images"


def _nameless(root: pathlib.Path) -> str:
    (root / "images/5.png").write_bytes((root / "images/4.png").read_bytes())
    return "5"


def _bytes_name(root: pathlib.Path) -> str:
    os.rename(root / "images/0.png", os.fsencode(root / "images") + b"/\xff\xfe.png")
    return ".png"


def _pipe(root: pathlib.Path) -> str:
    os.mkfifo(root / "images/5.png")
    return "5.png"


def _two_masks(root: pathlib.Path) -> str:
    (root / "masks/0.bmp").write_bytes((root / "masks/0.png").read_bytes())
    return "masks/0"


def _same_stem(root: pathlib.Path) -> str:
    (root / "images/0.jpg").write_bytes((root / "images/0.png").read_bytes())
    return "images/0"


_TREES = {
    "two links to the folder": _loop,
    "an image without a mask": _nameless,
    "a name that is not UTF-8": _bytes_name,
    "a pipe": _pipe,
    "two masks": _two_masks,
    "two images of one name": _same_stem,
    "masks is a file": lambda root: ((root / "masks").rename(root / "m"), (root / "masks").write_text("x"), "masks")[
        -1
    ],
    "no images": lambda root: ((root / "images").rename(root / "i"), (root / "images").mkdir(), "images")[-1],
}


def _tree(place: Place, rng: random.Random, mode: str) -> Attack:
    how = rng.choice(sorted(_TREES))
    mode = "check" if mode == "eval" else mode
    culprit = _TREES[how](place.root)
    workdir = place.out / "new"
    argv = [f"--mode={mode}", *place.config(source="labeled=images,val=0.3", train__steps=1)]
    argv += [f"--workdir={workdir}"] if mode == "train" else []
    verify = lambda stdout: "accepted" if how != "two links to the folder" else _counted(stdout)  # noqa: E731
    return Attack(f"folders: {how}", mode, argv, (culprit, "images"), (workdir,), verify)


def _counted(stdout: str) -> str:
    """Each image counts once."""
    return "other: links are not followed" if "images/a/b/" not in stdout and " 41 " not in stdout else "counted again"
