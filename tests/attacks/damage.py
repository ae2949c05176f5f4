"""Damage to files: deleted, cut, flipped, and what else disks and people do to them."""

import json
import os
import pathlib
import random
import shutil


def delete(path: pathlib.Path, rng: random.Random) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def truncate(path: pathlib.Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) or 1)])


def empty(path: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def flip_bit(path: pathlib.Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def zero(path: pathlib.Path, rng: random.Random) -> None:
    """Overwrites a part with zeros, as a power loss does."""
    content = bytearray(path.read_bytes())
    if content:
        start = rng.randrange(len(content))
        end = rng.randrange(start, len(content)) + 1
        content[start:end] = bytes(end - start)
    path.write_bytes(content)


def other_json(path: pathlib.Path, rng: random.Random) -> None:
    path.write_text(
        rng.choice(["{}", "[]", '"text"', "3", "null", "true", '[{"step": 1}]', '{"step": "x"}', "{'a': 1}"])
    )


def other_value(path: pathlib.Path, rng: random.Random) -> None:
    """Gives a random value of a JSON file (or of a line of one) another type."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    at = rng.randrange(len(lines))
    content = json.loads(lines[at])
    holder, key = content, None
    while True:
        keys = sorted(holder) if isinstance(holder, dict) else range(len(holder))
        key = rng.choice(list(keys))
        if not isinstance(holder[key], dict | list) or not holder[key] or rng.random() < 0.2:
            break
        holder = holder[key]
    holder[key] = rng.choice([None, "x", [], {}, -1, True, 1e400])
    lines[at] = json.dumps(content)
    path.write_text("\n".join(lines) + "\n")


def noise(path: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.randrange(1, 300)))


def unreadable(path: pathlib.Path, rng: random.Random) -> None:
    """Reading fails: with EACCES or, for root, whom no permission stops, with EIO as on a broken disk."""
    if os.geteuid():
        path.chmod(0)
        return
    delete(path, rng)
    path.symlink_to("/proc/self/mem")


def folder(path: pathlib.Path, rng: random.Random) -> None:
    delete(path, rng)
    path.mkdir()


def link_to_itself(path: pathlib.Path, rng: random.Random) -> None:
    delete(path, rng)
    path.symlink_to(path)


def pipe(path: pathlib.Path, rng: random.Random) -> None:
    delete(path, rng)
    os.mkfifo(path)


def append_noise(path: pathlib.Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.choice([b"\0" * 40 + b"\n", b"\xff\xfe\n", b"\n\n", b"{\n", b'{"a": 1}\n', rng.randbytes(30)]))


BYTES = {"truncated": truncate, "empty": empty, "bit flipped": flip_bit, "zeroed": zero, "noise": noise}
KINDS = {
    "deleted": delete,
    "unreadable": unreadable,
    "a folder": folder,
    "link to itself": link_to_itself,
    "pipe": pipe,
}
