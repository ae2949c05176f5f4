"""Atomic and append-only files on a local disk and on a bucket, and a run whose work directory is on a bucket."""

import json
import tempfile

import pytest
from etils import epath

from configs.checks import ConfigError
from dssn_jax import distributed
from dssn_jax.evaluation import evaluate
from dssn_jax.training import loop
from dssn_jax.workdir import checkpoint, files, recorder, restore
from tests import bucket


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
    local, remote = (recorder.read_metrics(workdir) for workdir in (tmp_path, "gs://runs/a/1"))
    assert [(line["step"], line.get("loss")) for line in local] == [(line["step"], line.get("loss")) for line in remote]
    log = (gs / "a/1/log.txt").read_text()
    assert "starting from random weights" in log and "continuing from step 4" in log
    assert any(path.name.startswith("events") for path in (gs / "a/1/tensorboard").iterdir())

    scores = evaluate.evaluate("gs://runs/a/1", config=restore.read_config("gs://runs/a/1"), checkpoint="latest")
    assert json.loads((gs / "a/1/eval_6.json").read_text())["student"] == scores["student"]
    assert scores["student"]["miou"] == pytest.approx(uninterrupted["student"]["last"]["miou"])
