"""Atomic and append-only files on a local disk and on a bucket, and a run whose work directory is on a bucket."""

import contextlib
import errno
import json
import pathlib
import socket
import subprocess
import sys
import tempfile

import pytest
from etils import epath

from configs.checks import ConfigError
from dssn_jax import distributed
from dssn_jax.evaluation import evaluate
from dssn_jax.training import loop
from dssn_jax.workdir import checkpoint, files, records
from tests import bucket

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def gs(monkeypatch):
    """Returns the path of an empty bucket."""
    with bucket.simulated("runs") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield epath.Path("gs://runs")


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path):
    return epath.Path(tmp_path) if request.param == "disk" else request.getfixturevalue("gs")


def test_atomic_files_appear_on_exit_or_not_at_all(root):
    path = root / "a" / "numbers.json"
    path.parent.mkdir(parents=True)
    with files.atomic_write(path) as part:
        part.write_text("1")
        assert not path.exists()
    with pytest.raises(KeyError), files.atomic_write(path) as part:
        part.write_text("2")
        raise KeyError
    assert path.read_text() == "1" and [entry.name for entry in path.parent.iterdir()] == ["numbers.json"]


def test_files_of_the_user_are_left_alone(tmp_path):
    mine = [tmp_path / name for name in (".a.part", "a.part", ".a.tmp")]
    for path in mine:
        path.write_text("mine")
    with files.atomic_write(tmp_path / "a") as part:
        part.write_text("1")
    assert all(path.read_text() == "mine" for path in mine)
    assert (tmp_path / "a").stat().st_mode == mine[0].stat().st_mode
    assert len(list(tmp_path.iterdir())) == 4


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"), files.atomic_write(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")


HOLD = """
import sys, time
from dssn_jax.workdir import files
folder = files.Folder(sys.argv[1])
print("locked", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    """Told who holds the lock; a killed process leaves none behind."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "locked\n"
        expected = (
            f"{tmp_path}: process {first.pid} on {socket.gethostname()} trains in this work directory; .*--workdir"
        )
        with pytest.raises(files.LockedError, match=expected):
            files.Folder(tmp_path)
        first.kill()
    files.Folder(tmp_path).close()
    files.Folder(tmp_path).close()


def test_a_damaged_name_of_the_holder_is_shown_in_one_line(tmp_path):
    with contextlib.closing(files.Folder(tmp_path)):
        (tmp_path / files.LOCK).write_bytes(b"\xff\x00\n\x1b[31m" * 100)
        with pytest.raises(files.LockedError) as refused:
            files.Folder(tmp_path)
    assert str(refused.value).isprintable()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with caplog.at_level("WARNING", "dssn"), contextlib.closing(files.Folder(tmp_path)):
        assert "No locks available" in caplog.text


def test_appended_files_reach_their_folder_and_are_continued(root):
    for content in ("first\n", "second\n"):
        folder = files.Folder(root / "run", continued=("log.txt",))
        with (folder.append_dir / "log.txt").open("a") as file:
            file.write(content)
        (folder.append_dir / "board").mkdir(exist_ok=True)
        (folder.append_dir / "board" / content.strip()).write_text(content)
        folder.close()
    assert (root / "run" / "log.txt").read_text() == "first\nsecond\n"
    assert sorted(path.name for path in (root / "run" / "board").iterdir()) == ["first", "second"]


def test_sync_does_not_overwrite_what_another_process_wrote(gs):
    for content in ("first\n", "second\n"):
        both = [files.Folder(gs / "run", continued=("log.txt",)) for _ in range(2)]
        with (both[0].append_dir / "log.txt").open("a") as file:
            file.write(content)
        for folder in both:
            folder.close()
    assert (gs / "run" / "log.txt").read_text() == "first\nsecond\n"


def test_paths_of_buckets_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(files.absolute("gs://runs/a")) == "gs://runs/a"
    assert str(files.absolute("a/../b")) == str(tmp_path / "b")


@pytest.mark.slow
def test_a_run_on_a_bucket_is_stopped_and_continued_as_on_a_disk(tiny_config, gs, tmp_path, monkeypatch):
    config = tiny_config("supervised", train__pictures=0)
    uninterrupted = loop.train(config, tmp_path)
    with monkeypatch.context() as notice:
        notice.setattr(distributed.Preemption, "reached", lambda self, step: step == 4)
        with pytest.raises(distributed.PreemptedError, match="step 4 of 6, which is saved in gs://runs/a/1"):
            loop.train(config, "gs://runs/a/1")
    assert checkpoint.exists("gs://runs/a/1")
    with monkeypatch.context() as folder:
        folder.setattr(tempfile, "tempdir", str(tmp_path))
        with pytest.raises(ConfigError, match="cannot be continued exactly from step 4"):
            loop.train(tiny_config("supervised", train__pictures=0, optimizer__lr=0.01), "gs://runs/a/1")
    assert not list(tmp_path.glob("append_dir_*"))
    continued = loop.train(config, "gs://runs/a/1")
    assert continued["student"] == uninterrupted["student"]
    local, remote = (records.read_metrics(workdir) for workdir in (tmp_path, "gs://runs/a/1"))
    assert [(line["step"], line.get("loss")) for line in local] == [(line["step"], line.get("loss")) for line in remote]
    log = (gs / "a/1/log.txt").read_text()
    assert "starting from random weights" in log and "continuing from step 4" in log
    assert any(path.name.startswith("events") for path in (gs / "a/1/tensorboard").iterdir())

    scores = evaluate.evaluate("gs://runs/a/1", config=records.read_config("gs://runs/a/1"), checkpoint="latest")
    assert json.loads((gs / "a/1/eval_6.json").read_text())["student"] == scores["student"]
    assert scores["student"]["miou"] == pytest.approx(uninterrupted["student"]["last"]["miou"])
