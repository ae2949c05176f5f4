"""Attacks on files of weights, which are converted, or trained from."""

import io
import json
import os
import pathlib
import pickle
import random
import struct
import zipfile

import ml_dtypes  # noqa: F401  Registers bfloat16 with NumPy.
import numpy as np
import safetensors.numpy
import torch

from tests.attacks import damage
from tests.attacks.attack import Attack
from tests.attacks.fixtures import Place, arrays, differing

_FILES = {**damage.BYTES, **damage.KINDS}
_FILES.pop("empty")


def generate(place: Place, rng: random.Random) -> Attack:
    """Damages a file of weights."""
    suffix = rng.choice([".pth", ".safetensors"])
    path = place.copy(f"weights/w{suffix}")
    own = _PTH if suffix == ".pth" else _SAFETENSORS
    how = rng.choice([*_FILES, *own, *own, *_TENSORS])
    if how in _FILES:
        _FILES[how](path, rng)
    elif how in own:
        own[how](path, rng)
    else:
        _save(path, _TENSORS[how](dict(place.oracle["tensors"]), rng))
    return _command(place, rng, path, how)


def _command(place: Place, rng: random.Random, path: pathlib.Path, how: str) -> Attack:
    to = rng.choice(["file", "file", "workdir", "train"])
    target = place.out / ("w.safetensors" if to == "file" else "new")
    config = place.config(train__steps=1)
    if to == "train":
        argv = [*config, f"--workdir={target}", f"--config.model.pretrained={path}"]
    else:
        argv = ["--mode=convert", *config, f"--from={path}", f"--to={target}"]

    def verify(stdout: str) -> str:
        if (place.scratch / "cwd/RAN").exists():
            return "code in the pickle ran"
        return _result(place, path, how, target, to)

    return Attack(f"{path.name} {how}", f"convert/{to}" if to != "train" else to, argv, (path.name,), (target,), verify)


def _result(place: Place, path: pathlib.Path, how: str, target: pathlib.Path, to: str) -> str:
    """Returns what is wrong with weights that were accepted."""
    if how in _REFUSED:
        return "accepted"
    if to != "file":
        values = [array for array in arrays(target).values() if array.dtype.kind == "f"]
        finite = all(np.isfinite(array).all() for array in values)
        exact = to == "train" or _exact(place, path, how)
        return "other: trained or converted" if finite and exact else "not finite" if not finite else "other tensors"
    found = safetensors.numpy.load_file(target)
    if not all(np.isfinite(value).all() for value in found.values() if value.dtype.kind == "f"):
        return "not finite"
    if how in ("float16", "float64", "bfloat16"):
        loose = all(
            np.allclose(found[name], value, atol=0.02, rtol=0.02) for name, value in place.oracle["tensors"].items()
        )
        return "other: rounded" if loose else "other tensors"
    wrong = differing(place.oracle["tensors"], found)
    if wrong and path.suffix == ".safetensors" and how in damage.BYTES:
        held = safetensors.numpy.load_file(path)
        same = all(np.array_equal(held[name], found[name]) for name in found if name in held)
        return "other: what the file holds; its format has no checksums" if same else wrong
    return wrong


def _exact(place: Place, path: pathlib.Path, how: str) -> bool:
    """Returns whether a file that was accepted holds what its reader must notice: .pth files have checksums."""
    if path.suffix != ".pth" or how not in damage.BYTES:
        return True
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:
        return False


def _save(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    else:
        torch.save({name: _to_torch(value) for name, value in tensors.items()}, path)


def _to_torch(value: np.ndarray) -> torch.Tensor:
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(value))


def _cast(dtype: str):
    def change(tensors: dict, rng: random.Random) -> dict:
        return {name: value.astype(dtype) if value.dtype.kind == "f" else value for name, value in tensors.items()}

    return change


def _put(number: float):
    """Sets one weight."""

    def change(tensors: dict, rng: random.Random) -> dict:
        name = rng.choice(sorted(name for name, value in tensors.items() if value.dtype.kind == "f"))
        tensors[name] = tensors[name].copy()
        tensors[name].flat[rng.randrange(tensors[name].size)] = number
        return tensors

    return change


def _without(tensors: dict, rng: random.Random) -> dict:
    tensors.pop(rng.choice(sorted(name for name in tensors if "num_batches" not in name)))
    return tensors


def _renamed(tensors: dict, rng: random.Random) -> dict:
    name = rng.choice(sorted(name for name in tensors if "num_batches" not in name))
    tensors[f"{name}\x1b[31m\n"] = tensors.pop(name)
    return tensors


def _reshaped(tensors: dict, rng: random.Random) -> dict:
    name = rng.choice(sorted(name for name, value in tensors.items() if value.ndim == 4))
    tensors[name] = tensors[name][..., None]
    return tensors


def _negative_variance(tensors: dict, rng: random.Random) -> dict:
    name = rng.choice(sorted(name for name in tensors if name.endswith("running_var")))
    tensors[name] = tensors[name] - 1e3
    return tensors


_TENSORS = {
    "float16": _cast("float16"), "float64": _cast("float64"), "bfloat16": _cast("bfloat16"), "int8": _cast("int8"),
    "bool": _cast("bool"), "int64": _cast("int64"), "a nan": _put(np.nan), "an inf": _put(np.inf),
    "tensor missing": _without, "tensor renamed": _renamed, "tensor reshaped": _reshaped,
    "negative variance": _negative_variance,
}  # fmt: skip


# .safetensors


def _header(change):
    def apply(path: pathlib.Path, rng: random.Random) -> None:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        name = rng.choice(sorted(name for name in header if name != "__metadata__"))
        change(header[name], rng)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return apply


def _length(number: int):
    return lambda path, rng: path.write_bytes(struct.pack("<Q", number) + path.read_bytes()[8:])


_SAFETENSORS = {
    "length of the header 2**63": _length(2**63),
    "length of the header 0": _length(0),
    "length of the header 100 MB": _length(100_000_000),
    "lying shape": _header(lambda entry, rng: entry.update(shape=[2**40, 2**40])),
    "negative shape": _header(lambda entry, rng: entry.update(shape=[-1])),
    "lying offsets": _header(lambda entry, rng: entry.update(data_offsets=[0, 2**50])),
    "reversed offsets": _header(lambda entry, rng: entry["data_offsets"].reverse()),
    "unknown dtype": _header(lambda entry, rng: entry.update(dtype="F13")),
    "a zip": lambda path, rng: path.write_bytes(b"PK\x03\x04" + rng.randbytes(100)),
    "empty": damage.empty,
}


# .pth


class _Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _foreign(*call):
    return lambda path, rng: torch.save({"model": {"a": _Call(*call)}}, path)


def _bare_pickle(path: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(pickle.dumps(_Call(os.system, "touch RAN"), protocol=rng.randrange(5)))


def _compressed(path: pathlib.Path, rng: random.Random) -> None:
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))


def _bomb(path: pathlib.Path, rng: random.Random) -> None:
    """Replaces the tensors' bytes by a gigabyte and a half of zeros, which compress to little."""
    with (
        zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        bombed = False
        for entry in old.infolist():
            if "/data/" in entry.filename and not bombed:
                with new.open(zipfile.ZipInfo(entry.filename), "w", force_zip64=True) as file:
                    for _ in range(1536):
                        file.write(bytes(1 << 20))
                bombed = True
            else:
                new.writestr(entry.filename, old.read(entry))


def _complex(path: pathlib.Path, rng: random.Random) -> None:
    tensors = torch.load(path, weights_only=True)
    torch.save(
        {name: value.to(torch.complex64) if value.is_floating_point() else value for name, value in tensors.items()},
        path,
    )


def _numpy_like(path: pathlib.Path, rng: random.Random) -> None:
    torch.save({"epoch": float("nan"), "model": [1, 2, 3], "previous_best": "x" * 1000}, path)


_PTH = {
    "calls os.system": _foreign(os.system, "touch RAN"),
    "calls eval": _foreign(eval, "open('RAN', 'w')"),
    "calls open": _foreign(open, "RAN", "w"),
    "bare pickle": _bare_pickle,
    "compressed": _compressed,
    "zip bomb": _bomb,
    "complex": _complex,
    "no tensors": _numpy_like,
    "a tensor": lambda path, rng: torch.save(torch.zeros(3), path),
    "odd keys": lambda path, rng: torch.save({0: torch.zeros(3), None: torch.zeros(2), (1, 2): torch.ones(1)}, path),
    "sparse": lambda path, rng: torch.save({"a": torch.eye(3).to_sparse()}, path),
    "empty": damage.empty,
}
_REFUSED = {
    "int8", "bool", "int64", "a nan", "an inf", "tensor missing", "tensor renamed", "tensor reshaped",
    "negative variance", *(name for name in (*_PTH, *_SAFETENSORS) if name != "compressed"), *damage.KINDS,
}  # fmt: skip
