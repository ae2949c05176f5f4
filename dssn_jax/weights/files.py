"""Reads and writes files of state dicts: PyTorch's .pth (zip and legacy format) and .safetensors.

Code in a file is never run: pickles are read by PyTorch's `weights_only` unpickler. Only this module imports PyTorch,
and only for .pth.
"""

import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping

import ml_dtypes  # Also registers bfloat16 with NumPy, where safetensors looks it up by name.
import numpy as np
import safetensors
import safetensors.numpy

from dssn_jax.workdir.files import atomic_write
from input_pipeline.errors import UserError

TORCH_SUFFIXES = (".pth", ".pt")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")  # Formats that can be written.
_METADATA = ("epoch", "previous_best")  # Numbers beside the weights in the original's checkpoints.


class StateDictError(UserError):
    """A file of weights that cannot be used; the message names the file, the problem and what is expected."""


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    """Returns the tensors of a file by name, and its metadata.

    The metadata of a .safetensors file are str -> str. Any other file is read as PyTorch's: a state dict, or one under
    `model` or `state_dict`, whose metadata are `epoch` and `previous_best` where present. Tensors in bfloat16 become
    float32, which is exact.

    Raises StateDictError for a file that is missing, damaged or of another kind, or whose pickle would run code.
    """
    if not path.is_file():
        raise StateDictError(f"{path}: no such file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise StateDictError(f"{path}: cannot be read: {error.strerror}") from None
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def write(path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a state dict atomically, in the format of the suffix (one of SUFFIXES).

    Only .safetensors files hold `metadata`; a .pth is the bare state dict. Tensors in bfloat16 become float32.
    Raises StateDictError if the file cannot be written.
    """
    tensors = {name: np.asarray(_widen(value), order="C") for name, value in tensors.items()}
    try:
        with atomic_write(path) as part:
            if path.suffix == ".safetensors":
                safetensors.numpy.save_file(tensors, part, {"format": "pt", **metadata})
            else:
                torch = _import_torch(path)
                torch.save({name: torch.from_numpy(value.copy()) for name, value in tensors.items()}, part)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # A missing folder, a full disk.
        raise StateDictError(f"{path}: cannot be written: {error}") from None


def check_writable(path: pathlib.Path) -> None:
    """Raises StateDictError if `write` would for lack of PyTorch."""
    if path.suffix in TORCH_SUFFIXES:
        _import_torch(path)


def _read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: _widen(file.get_tensor(name)) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, TypeError) as error:  # TypeError: a dtype that NumPy does not have.
        raise StateDictError(f"{path}: not a safetensors file, or damaged or cut short ({error})") from None


def _read_torch(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    torch = _import_torch(path)
    try:
        # An unusual pickle protocol causes a warning, and an error where it matters.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(_numpy_scalars()):
            # Memory-mapped: the optimizer's state, which is not read, takes no memory.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:  # A damaged file can raise anything.
        raise StateDictError(f"{path}: {_reason(error)}") from None
    state_dict, metadata = _unwrap(content)
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise StateDictError(f"{path}: no tensors in it; expected a state dict, or one under 'model' or 'state_dict'")
    try:
        return {str(name): _to_numpy(torch, value) for name, value in tensors.items()}, metadata
    except (RuntimeError, TypeError) as error:  # Quantized and sparse tensors.
        raise StateDictError(f"{path}: a tensor is of a kind that cannot be read: {error}") from None


def _reason(error: Exception) -> str:
    """Returns why PyTorch refused a file, with the name of the code that the file would run, if any."""
    refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if refused:
        return (
            f"refused, nothing was run: its pickle asks for {refused[1]}; only tensors, plain containers and NumPy "
            "scalars are read"
        )
    return "not a file of PyTorch weights, or damaged or cut short"


def _unwrap(content) -> tuple[Mapping, dict]:
    """Returns the state dict in the content of a file, and the metadata beside it."""
    if not isinstance(content, Mapping):
        return {}, {}
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            return content[key], {name: float(content[name]) for name in _METADATA if _is_number(content.get(name))}
    return content, {}


def _is_number(value) -> bool:
    return isinstance(value, int | float | np.number)


def _to_numpy(torch, tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


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
    return torch
