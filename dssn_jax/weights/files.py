"""Reads and writes files of state dicts: PyTorch's .pth (zip and legacy format) and .safetensors.

Code in a file is never run: pickles are read by PyTorch's `weights_only` unpickler. Only this module imports PyTorch,
and only for .pth.
"""

import os
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping

import ml_dtypes  # Also registers bfloat16 with NumPy, where safetensors looks it up by name.
import numpy as np
import safetensors
import safetensors.numpy

from configs.checks import shorten
from dssn_jax.workdir.files import atomic_write
from input_pipeline.errors import DataError, UserError, printable
from input_pipeline.files import open_regular

TORCH_SUFFIXES = (".pth", ".pt")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")  # Formats that can be written.
# Entry of a checkpoint of the original or of UniMatch V2 -> the network in it.
_NETWORKS = {"model": "student", "state_dict": "student", "model_ema": "teacher"}
# Numbers beside the weights in such checkpoints.
NUMBERS = ("epoch", "previous_best", "previous_best_ema", "best_epoch", "best_epoch_ema")
_MOST_BYTES = 1 << 40
_LEAST_TORCH = (2, 6)  # Earlier ones may run code of a file that they read as `weights_only`.


class StateDictError(UserError):
    """A file of weights that cannot be used; the message names the file, the problem and what is expected."""


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    """Returns the tensors of a file by name, those of its student, and its metadata; see `read_networks`."""
    networks, metadata = read_networks(path)
    return networks["student"], metadata


def read_networks(path: pathlib.Path) -> tuple[dict[str, dict[str, np.ndarray]], dict]:
    """Returns the networks in a file, student and perhaps teacher, as tensors by name, and its metadata.

    The metadata of a .safetensors file are str -> str. Any other file is read as PyTorch's: a state dict, or one under
    `model` or `state_dict`, whose metadata are the NUMBERS beside it, and whose teacher is under `model_ema`. Tensors
    in bfloat16 become float32, which is exact.

    Raises StateDictError for a file that is missing, damaged or of another kind, whose pickle would run code, or that
    would take more memory than it has bytes.
    """
    try:
        open_regular(os.fspath(path), _MOST_BYTES).close()
    except DataError as error:
        raise StateDictError(str(error)) from None
    except FileNotFoundError:
        raise StateDictError(f"{path}: no such file") from None
    except OSError as error:
        raise StateDictError(f"{path}: cannot be read: {error.strerror}") from None
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        return {"student": tensors}, metadata
    return _read_torch(path)


def write(path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a state dict atomically, in the format of the suffix (one of SUFFIXES).

    Only .safetensors files hold `metadata`; a .pth is the bare state dict. Tensors in bfloat16 become float32.
    Raises StateDictError if the file cannot be written.
    """
    if path.suffix == ".safetensors":
        _write(path, lambda part: safetensors.numpy.save_file(_own(tensors), part, {"format": "pt", **metadata}))
    else:
        torch = _import_torch(path)
        _write(path, lambda part: torch.save(_to_torch(torch, tensors), part))


def write_checkpoint(path: pathlib.Path, networks: Mapping[str, Mapping], numbers: Mapping[str, float]) -> None:
    """Writes a checkpoint as `read_networks` reads it atomically: student and perhaps teacher, and some of NUMBERS.

    `path` has one of TORCH_SUFFIXES. Raises StateDictError if the file cannot be written.
    """
    torch = _import_torch(path)
    entries = {"student": "model", "teacher": "model_ema"}
    content = {entries[name]: _to_torch(torch, tensors) for name, tensors in networks.items()}
    _write(path, lambda part: torch.save({**content, **numbers}, part))


def _write(path: pathlib.Path, save: Callable[[pathlib.Path], None]) -> None:
    try:
        with atomic_write(path) as part:
            save(part)
    except (OSError, RuntimeError, UnicodeError, safetensors.SafetensorError) as error:  # No folder, a full disk.
        raise StateDictError(f"{path}: cannot be written: {error}") from None


def _own(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors as contiguous arrays of the dtypes that every reader knows."""
    return {name: np.asarray(_widen(value), order="C") for name, value in tensors.items()}


def _to_torch(torch, tensors: Mapping[str, np.ndarray]) -> dict:
    return {name: torch.from_numpy(value.copy()) for name, value in _own(tensors).items()}


def check_writable(path: pathlib.Path) -> None:
    """Raises StateDictError if `write` would for lack of PyTorch."""
    if path.suffix in TORCH_SUFFIXES:
        _import_torch(path)


def _read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: _widen(file.get_tensor(name)) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, TypeError, UnicodeError) as error:  # TypeError: a dtype unknown to NumPy.
        raise StateDictError(f"{path}: not a safetensors file, or damaged or cut short ({error})") from None
    except OSError as error:  # A device, for example, cannot be mapped.
        raise StateDictError(f"{path}: cannot be read: {error}") from None


def _read_torch(path: pathlib.Path) -> tuple[dict[str, dict[str, np.ndarray]], dict]:
    torch = _import_torch(path)
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_zip(path)
        # An unusual pickle protocol causes a warning, and an error where it matters.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(_numpy_scalars()):
            # Memory-mapped: the optimizer's state, which is not read, takes no memory.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except StateDictError:
        raise
    except MemoryError:
        raise StateDictError(f"{path}: needs more memory than there is") from None
    except Exception as error:  # A damaged file can raise anything.
        raise StateDictError(f"{path}: {_reason(error)}") from None
    state_dicts, metadata = _unwrap(content)
    networks = {
        network: {
            str(name): _to_numpy(torch, value, f"{path}: {printable(str(name))}")
            for name, value in state_dict.items()
            if isinstance(value, torch.Tensor)
        }
        for network, state_dict in state_dicts.items()
    }
    if not networks["student"]:
        raise StateDictError(f"{path}: no tensors in it; expected a state dict, or one under 'model' or 'state_dict'")
    return {network: tensors for network, tensors in networks.items() if tensors}, metadata


def _check_zip(path: pathlib.Path) -> None:
    """Raises StateDictError for entries that are compressed, larger than the file, or other than when written.

    PyTorch's reader does not compare checksums, and takes the bytes of a compressed entry for numbers.
    """
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise StateDictError(
                    f"{path}: {printable(entry.filename)} in it is compressed ({entry.compress_size} bytes, "
                    f"{entry.file_size} when read); expected a file as torch.save writes it, without compression"
                )
        if sum(entry.file_size for entry in file.infolist()) > os.path.getsize(path):
            raise StateDictError(f"{path}: what is in it is larger than the file; expected a file of torch.save")
        if damaged := file.testzip():
            raise StateDictError(f"{path}: damaged: {printable(damaged)} in it does not have its checksum")


def _reason(error: Exception) -> str:
    """Returns why PyTorch refused a file, with the name of the code that the file would run, if any."""
    refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if refused:
        return (
            f"refused, nothing was run: its pickle asks for {refused[1]}; only tensors, plain containers and NumPy "
            "scalars are read"
        )
    return "not a file of PyTorch weights, or damaged or cut short"


def _unwrap(content) -> tuple[dict[str, Mapping], dict]:
    """Returns the state dicts of the networks in the content of a file, and the metadata beside them."""
    if not isinstance(content, Mapping):
        return {"student": {}}, {}
    networks = {}
    for key, network in _NETWORKS.items():
        if isinstance(content.get(key), Mapping):
            networks.setdefault(network, content[key])
    if "student" not in networks:
        return {"student": content}, {}
    return networks, {name: _number(content[name]) for name in NUMBERS if _is_number(content.get(name))}


def _number(value: float | np.number) -> float:
    return value if isinstance(value, int) else float(value)


def _is_number(value) -> bool:
    return isinstance(value, int | float | np.number)


def _to_numpy(torch, tensor, name: str) -> np.ndarray:
    try:
        tensor = tensor.detach()
        if tensor.numel() > tensor.untyped_storage().nbytes():  # A view that repeats a few bytes.
            raise TypeError(f"{tuple(tensor.shape)} with less than a byte per number")
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # Quantized and sparse tensors.
        raise StateDictError(f"{name} is of a kind that cannot be read: {shorten(error)}") from None


def _widen(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype == ml_dtypes.bfloat16 else value


def _numpy_scalars() -> list:
    """Returns what the pickle of a NumPy scalar needs, as named by NumPy 1 and 2. None of it runs code of the file."""
    scalar = np.float64(0).__reduce__()[0]
    types = {type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8", "u1", "?")}
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [np.dtype, *types, *((scalar, name) for name in names)]


def _import_torch(path: pathlib.Path):
    try:
        import torch
    except ImportError:
        raise StateDictError(
            f"{path}: files of PyTorch (.pth) need PyTorch, which is not installed (pip install torch); "
            ".safetensors files do not"
        ) from None
    if tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2]) < _LEAST_TORCH:
        raise StateDictError(
            f"{path}: files of PyTorch (.pth) need PyTorch {'.'.join(map(str, _LEAST_TORCH))} or later, which runs no "
            f"code in them; {torch.__version__} is installed (pip install --upgrade torch)"
        )
    return torch
