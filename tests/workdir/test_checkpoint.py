"""Checkpoints: what is kept, what is refused, and that no damage is read as if it were whole."""

import contextlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dssn_jax import sharding
from dssn_jax.workdir import checkpoint
from dssn_jax.workdir.checkpoint import Checkpointer, CheckpointError, DamagedError, DivergedError
from experiments.compilations import Compilations
from tests.input_pipeline.special_files import make_special


def make_state(step, **values):
    """Returns a small state with arrays of different sizes."""
    rng = np.random.default_rng(step)
    kernel = rng.standard_normal((3, 3, 16, 64)).astype(np.float32)
    return {
        "step": jnp.int32(step),
        "student": {"params": {"kernel": jnp.array(kernel), "bias": jnp.zeros(7)}, **values},
        "opt_state": (jnp.array(kernel / 2), {}),
    }


LIKE = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), make_state(0))


@pytest.fixture
def config(tiny_config):
    return tiny_config("supervised")


@pytest.fixture
def workdir(tmp_path, config):
    """Returns a work directory with the checkpoints of steps 2 (the best) and 4."""
    save(tmp_path, config, 2, best=2)
    save(tmp_path, config, 4, best=2)
    return tmp_path


def save(workdir, config, step, best=None, state=None):
    meta = {"config": json.loads(config.to_json()), "steps": 4, "scores": {"best_step": best, "miou": float("nan")}}
    with contextlib.closing(Checkpointer(workdir)) as saved:
        saved.save(step, make_state(step) if state is None else state, meta)
        saved.wait()


def read(workdir, config, name):
    """Returns the state and meta of a checkpoint by its name."""
    with contextlib.closing(Checkpointer(workdir, read_only=True)) as saved:
        return saved.restore(saved.resolve(name), LIKE, config)


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def files_of(workdir, step):
    return sorted(path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file())


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("values", [{}, {"large": np.arange(2.0**20, dtype=np.float32)}])
def test_only_large_arrays_are_cut_among_devices(values, tmp_path, config):
    """Cutting takes a program per shape and device. What was saved on four devices is read back on any."""
    everywhere = [sharding.replicated(sharding.make_mesh(jax.devices()[:count])) for count in (4, 1)]
    state = jax.device_put(make_state(3, **values), everywhere[0])
    programs = Compilations()
    save(tmp_path, config, 3, state=state)
    counts = programs.take()
    assert bool(counts["compiled"] + counts["loaded"]) == bool(values)
    for placement in everywhere:
        like = jax.tree.map(lambda x, at=placement: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state)
        with contextlib.closing(Checkpointer(tmp_path, read_only=True)) as saved:
            restored, _ = saved.restore(3, like, config)
        jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_the_latest_and_the_best_are_kept_and_read(workdir, config):
    assert steps(workdir) == [2, 4]
    for name, step in (("latest", 4), ("best", 2), ("2", 2), (None, 2)):
        state, meta = read(workdir, config, name)
        jax.tree.map(np.testing.assert_array_equal, state, make_state(step))
        assert meta["step"] == step and meta["steps"] == 4
    save(workdir, config, 6, best=6)
    assert steps(workdir) == [6]


@pytest.mark.parametrize("name", ["²", "3", "-4", "04", "first", ""])
def test_checkpoints_that_are_not_there_are_refused(workdir, config, name):
    with pytest.raises(CheckpointError, match="no checkpoint '.*'; there are: latest, best, 2, 4"):
        read(workdir, config, name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Coroutines that orbax abandons.
def test_flipped_bits_are_noticed_in_every_file(workdir, config):
    """A checkpoint is read as it was saved, or the error names it and an undamaged one."""
    rng, noticed = np.random.default_rng(0), 0
    for path in files_of(workdir, 4):
        whole = path.read_bytes()
        for bit in rng.choice(8 * len(whole), min(2, 8 * len(whole)), replace=False):
            flip(path, bit)
            try:
                state, meta = read(workdir, config, "4")
            except CheckpointError as error:
                assert "checkpoints/4" in str(error) and "\n" not in str(error)
                assert "--checkpoint=2 reads that of step 2, which is whole" in str(error)
                noticed += 1
            else:
                jax.tree.map(np.testing.assert_array_equal, state, make_state(4))
                assert meta["step"] == 4 and meta["config"] == json.loads(config.to_json())
            path.write_bytes(whole)
    assert noticed > 8


def test_a_bit_of_the_arrays_is_named(workdir, config):
    """The bit is in the largest file; following the advice of the error, the run continues."""
    largest = max(files_of(workdir, 4), key=lambda path: path.stat().st_size)
    flip(largest, 8 * (largest.stat().st_size // 2))
    with pytest.raises(DamagedError, match=r"checkpoints/4: .*; to continue training from it, remove .*checkpoints/4"):
        read(workdir, config, "latest")
    shutil.rmtree(workdir / "checkpoints" / "4")
    assert int(read(workdir, config, "latest")[0]["step"]) == 2


def test_a_pipe_among_the_files_is_named(workdir, config):
    """Opening it would wait for ever."""
    largest = max(files_of(workdir, 4), key=lambda path: path.stat().st_size)
    make_special(largest, "pipe")
    with pytest.raises(DamagedError, match=rf"{largest.name}: a named pipe; expected a file; --checkpoint=2 reads"):
        read(workdir, config, "latest")


def test_another_state_under_the_same_meta_is_refused(workdir, config):
    shutil.rmtree(workdir / "checkpoints/4/state")
    shutil.copytree(workdir / "checkpoints/2/state", workdir / "checkpoints/4/state")
    with pytest.raises(DamagedError, match=r"4: damaged: .* opt_state/0, step, student/params/kernel; --checkpoint=2"):
        read(workdir, config, "latest")


def test_no_other_whole_checkpoint(workdir, config):
    for step in (2, 4):
        (workdir / f"checkpoints/{step}/meta/metadata").write_text("{}")
    with pytest.raises(DamagedError, match="checkpoints/4: damaged: its meta .*; no other checkpoint is whole"):
        read(workdir, config, "latest")


@pytest.mark.parametrize(
    "content", ["{}", "[]", "3", "null", '{"step": 4}', '{"config": {}, "checksum": 1}', "", "\x00"]
)
def test_meta_of_other_content_is_refused(workdir, config, content):
    (workdir / "checkpoints/4/meta/metadata").write_text(content)
    for name in ("latest", "best"):
        with pytest.raises(DamagedError, match="checkpoints/4: .*--checkpoint=2 reads"):
            read(workdir, config, name)
    assert read(workdir, config, "2")[1]["step"] == 2


def test_a_renamed_folder_is_refused(workdir, config):
    (workdir / "checkpoints/4").rename(workdir / "checkpoints/7")
    with pytest.raises(DamagedError, match="checkpoints/7: holds the checkpoint of step 4; rename it to 4"):
        read(workdir, config, "latest")


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e29, -2e15])
def test_values_that_are_not_finite_are_not_saved(workdir, config, value):
    with pytest.raises(DivergedError, match=r"step 6 is not saved: student/batch_stats/mean holds .*optimizer.lr"):
        save(workdir, config, 6, best=6, state=make_state(6, batch_stats={"mean": jnp.array([0.0, value])}))
    assert steps(workdir) == [2, 4]


def test_a_folder_that_cannot_be_opened_is_named(workdir, config):
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="checkpoints: no such folder"):
        read(workdir, config, "latest")
    with pytest.raises(CheckpointError, match="checkpoints: cannot save .*Not a directory"):
        save(workdir, config, 6)


def test_a_damaged_record_of_orbax_is_named(workdir, config):
    (workdir / "checkpoints/4/_CHECKPOINT_METADATA").write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be opened: .* 2/_CHECKPOINT_METADATA, 4/_CHECKPOINT_METADATA"):
        read(workdir, config, "latest")


def test_the_reason_of_a_failure_is_one_line():
    try:
        try:
            raise OSError(28, "No space left\non device")
        except OSError as error:
            raise RuntimeError("Event loop is closed") from error
    except RuntimeError as error:
        assert checkpoint._reason(error) == "[Errno 28] No space left on device"
