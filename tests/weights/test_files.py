"""Files of weights: reading returns what was written; a bad file is named and its code never run."""

import io
import os
import pickle
import re
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dssn_jax.weights import files
from dssn_jax.weights.files import StateDictError

TENSORS = {
    "conv.weight": np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32).transpose(0, 1, 3, 2),
    "bn.running_var": np.arange(4.0),
    "bn.num_batches_tracked": np.zeros((), np.int64),
}


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_what_is_written_is_read_back(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if suffix != ".safetensors":
        pytest.importorskip("torch")
    files.write(path, TENSORS, {"mean": "0.5"})
    tensors, metadata = files.read(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype and tensors[name].shape == value.shape
        np.testing.assert_array_equal(tensors[name], value)
    assert metadata.get("mean") == ("0.5" if suffix == ".safetensors" else None)


def test_bfloat16_becomes_float32_with_the_same_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    exact = np.array([1.0, -0.0078125, 3.140625], np.float32)
    torch.save({"a": torch.tensor(exact).bfloat16(), "b": torch.tensor(exact).half()}, tmp_path / "a.pth")
    safetensors.numpy.save_file({"a": exact.astype(ml_dtypes.bfloat16)}, tmp_path / "a.safetensors")
    files.write(tmp_path / "b.pth", {"a": exact.astype(ml_dtypes.bfloat16)}, {})
    for name in ("a.pth", "a.safetensors", "b.pth"):
        tensors, _ = files.read(tmp_path / name)
        assert tensors["a"].dtype == np.float32
        for value in tensors.values():
            np.testing.assert_array_equal(value.astype(np.float32), exact)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_checkpoints_with_numpy_scalars(legacy, module, tmp_path):
    """The form of the original's checkpoints, from NumPy 2 and NumPy 1."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "best.pth"
    content = {"model": {"module.a": torch.arange(3.0)}, "optimizer": {"state": {}}, "epoch": 7}
    content["previous_best"] = np.float64(76.5)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    if legacy:  # A zip archive has checksums and offsets, so its pickle cannot be edited in place.
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", module))
        assert module in path.read_bytes()
    tensors, metadata = files.read(path)
    np.testing.assert_array_equal(tensors["module.a"], [0, 1, 2])
    assert metadata == {"epoch": 7, "previous_best": 76.5}


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def rewrite(path, compression=zipfile.ZIP_STORED, change=lambda content: content):
    """Writes the entries of a zip file again."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(old.read(entry)))


def spoiled(kind, folder):
    """Writes a file that must be refused; returns its path."""
    torch = pytest.importorskip("torch")
    path = folder / "weights.pth"
    runs_code = RunsCode(folder / "was_run")
    if kind == "missing":
        return path
    if kind == "text":
        path.write_text("not weights\n")
    elif kind == "runs_code":
        torch.save({"model": runs_code}, path)
    elif kind == "runs_code_legacy":
        torch.save({"model": runs_code}, path, _use_new_zipfile_serialization=False)
    elif kind == "runs_code_pickle":
        path.write_bytes(pickle.dumps(runs_code, protocol=2))
    elif kind == "no_tensors":
        torch.save({"epoch": 3}, path)
    elif kind == "whole_module":
        torch.save(torch.nn.Linear(2, 2), path)
    elif kind.startswith("cut_short"):
        torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=kind == "cut_short")
        path.write_bytes(path.read_bytes()[:-1500])
    elif kind in ("compressed", "zip_bomb"):
        torch.save({"a": torch.ones(1000)}, path)
        zeros = bytes(10**7)
        rewrite(
            path,
            zipfile.ZIP_DEFLATED,
            lambda content: zeros if kind == "zip_bomb" and len(content) == 4000 else content,
        )
    elif kind == "flipped_bit":
        torch.save({"a": torch.full((1000,), 7.0)}, path)
        path.write_bytes(path.read_bytes().replace(np.full(9, 7, "<f4").tobytes(), np.full(9, 6, "<f4").tobytes(), 1))
    elif kind == "repeated_number":
        torch.save({"a": torch.ones(1).expand(10**12)}, path)
    elif kind == "sparse":
        torch.save({"a\x1b": torch.eye(3).to_sparse()}, path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "safetensors_lying":
        path = path.with_suffix(".safetensors")
        safetensors.numpy.save_file({"a": np.ones(1000)}, path)
        path.write_bytes(path.read_bytes().replace(b'"shape":[1000]', b'"shape":[9999]'))
    elif kind == "safetensors_cut_short":
        path = path.with_suffix(".safetensors")
        safetensors.numpy.save_file({"a": np.ones(1000)}, path)
        path.write_bytes(path.read_bytes()[:-1500])
    return path


REFUSED = {
    "missing": "no such file",
    "pipe": "a named pipe; expected a file",
    "text": "not a file of PyTorch weights",
    "runs_code": "refused, nothing was run: its pickle asks for posix.system",
    "runs_code_legacy": "refused, nothing was run: its pickle asks for posix.system",
    "runs_code_pickle": "refused, nothing was run: its pickle asks for posix.system|not a file of PyTorch weights",
    "no_tensors": "no tensors in it",
    "whole_module": "torch.nn.modules.linear.Linear",
    "cut_short": "damaged or cut short",
    "cut_short_legacy": "damaged or cut short",
    "compressed": "is compressed .*expected a file as torch.save writes it",
    "zip_bomb": "is compressed .*expected a file as torch.save writes it",
    "flipped_bit": "damaged: weights/data/0 in it does not have its checksum",
    "repeated_number": "a is of a kind that cannot be read",
    "sparse": r"a\\x1b is of a kind that cannot be read",
    "safetensors_lying": "not a safetensors file, or damaged",
    "safetensors_cut_short": "not a safetensors file, or damaged",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_files_are_named_and_not_run(kind, tmp_path):
    path = spoiled(kind, tmp_path)
    with pytest.raises(StateDictError, match=REFUSED[kind]) as error:
        files.read(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert not (tmp_path / "was_run").exists()


def test_the_files_that_run_code_would_run_it(tmp_path):
    """The files of the test above are as harmful as they are meant to be."""
    pickle.loads(pickle.dumps(RunsCode(tmp_path / "was_run")))
    assert (tmp_path / "was_run").exists()


def test_without_pytorch_only_pth_files_fail(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)  # `import torch` raises ImportError.
    (tmp_path / "a.pth").write_bytes(b"")
    for attempt in (
        lambda: files.read(tmp_path / "a.pth"),
        lambda: files.check_writable(tmp_path / "b.pth"),
    ):
        with pytest.raises(StateDictError, match=r"[ab]\.pth: .*need PyTorch, which is not installed"):
            attempt()
    files.write(tmp_path / "a.safetensors", TENSORS, {})
    assert files.read(tmp_path / "a.safetensors")[0].keys() == TENSORS.keys()


def test_old_pytorch_is_refused(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    for version, allowed in (("1.13.1", False), ("2.5.1+cu118", False), ("2.6.0a0", True), ("2.10.0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        if allowed:
            files.read(tmp_path / "a.pth")
            continue
        with pytest.raises(StateDictError, match=rf"need PyTorch 2\.6 or later.*{re.escape(version)} is installed"):
            files.read(tmp_path / "a.pth")


def test_a_write_that_fails_leaves_nothing(monkeypatch, tmp_path):
    def full(part, _):
        assert part.stat().st_size > 0
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StateDictError, match="a.safetensors: cannot be written: No space"):
        files.write(tmp_path / "a.safetensors", TENSORS, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_a_target_that_takes_no_file_is_named(suffix, tmp_path):
    if suffix != ".safetensors":
        pytest.importorskip("torch")
    with pytest.raises(StateDictError, match=f"nowhere/a{suffix}: cannot be written"):
        files.write(tmp_path / f"nowhere/a{suffix}", TENSORS, {})
