"""Files of PyTorch state dicts: .pth (zip and legacy format) and .safetensors.

Nothing in a file is ever run: pickles are read by PyTorch's `weights_only` unpickler. PyTorch is imported here alone,
and only for .pth.
"""

import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping

import ml_dtypes  # Also makes NumPy know bfloat16, which safetensors asks for by name.
import numpy as np
import safetensors
import safetensors.numpy

from dssn_jax.workdir import files
from input_pipeline.errors import UserError

TORCH_SUFFIXES = (".pth", ".pt")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")  # Of files that are written.
_NOTES = ("epoch", "previous_best")  # What the original's checkpoints tell beside the weights.


class StateDictError(UserError):
    """A file of weights that cannot be used: the message names it, what was found and what is expected."""


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    """Returns the tensors of a file by name, and what else it tells.

    A .safetensors file tells its metadata (str -> str). Any other file is taken for PyTorch's: a state dict, or one in
    a dict under `model` or `state_dict`, which tells `epoch` and `previous_best` where it has them. Tensors of bfloat16
    become float32, which holds the same numbers.

    Raises StateDictError for a file that is missing, damaged or of another kind, or whose pickle wants to run code.
    """
    if not path.is_file():
        raise StateDictError(f"{path}: no such file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise StateDictError(f"{path}: cannot be read: {error.strerror}") from None
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def write(path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a state dict, whole or not at all, in the format of the suffix (one of SUFFIXES).

    `metadata` goes into .safetensors alone; a .pth is the bare state dict. Tensors of bfloat16 become float32.
    Raises StateDictError where nothing can be written.
    """
    tensors = {name: np.asarray(_wide(value), order="C") for name, value in tensors.items()}
    try:
        with files.whole(path) as part:
            if path.suffix == ".safetensors":
                safetensors.numpy.save_file(tensors, part, {"format": "pt", **metadata})
            else:
                torch = _import_torch(path)
                torch.save({name: torch.from_numpy(value.copy()) for name, value in tensors.items()}, part)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # A folder or disk that takes no file.
        raise StateDictError(f"{path}: cannot be written: {error}") from None


def check_writable(path: pathlib.Path) -> None:
    """Raises StateDictError where `write` would, before any work is done."""
    if path.suffix in TORCH_SUFFIXES:
        _import_torch(path)


def _read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: _wide(file.get_tensor(name)) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, TypeError) as error:  # TypeError: numbers that NumPy does not know.
        raise StateDictError(f"{path}: not a safetensors file, or damaged or cut short ({error})") from None


def _read_torch(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    torch = _import_torch(path)
    try:
        # A warning of an unusual pickle protocol is followed by an error where it matters.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(_numpy_scalars()):
            # Mapped, so that the optimizer's state, which nobody reads here, takes no memory.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:  # A damaged file can raise anything.
        raise StateDictError(f"{path}: {_reason(error)}") from None
    state_dict, notes = _unwrap(content)
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise StateDictError(f"{path}: no tensors in it; expected a state dict, or one under 'model' or 'state_dict'")
    try:
        return {str(name): _to_numpy(torch, value) for name, value in tensors.items()}, notes
    except (RuntimeError, TypeError) as error:  # Quantized and sparse tensors.
        raise StateDictError(f"{path}: a tensor is of a kind that cannot be read: {error}") from None


def _reason(error: Exception) -> str:
    """Says why PyTorch refused a file; what it would run, if that is why."""
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if wanted:
        return (
            f"refused, nothing was run: its pickle asks for {wanted[1]}; only tensors, plain containers and NumPy "
            "scalars are read"
        )
    return "not a file of PyTorch weights, or damaged or cut short"


def _unwrap(content) -> tuple[Mapping, dict]:
    """Finds the state dict in what a file holds, and the notes beside it."""
    if not isinstance(content, Mapping):
        return {}, {}
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            return content[key], {note: float(content[note]) for note in _NOTES if _is_number(content.get(note))}
    return content, {}


def _is_number(value) -> bool:
    return isinstance(value, int | float | np.number)


def _to_numpy(torch, tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _wide(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype == ml_dtypes.bfloat16 else value


def _numpy_scalars() -> list:
    """What the pickle of a NumPy scalar needs, under the names of NumPy 1 and 2. None of it runs code of the file."""
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
