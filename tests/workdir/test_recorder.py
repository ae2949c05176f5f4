"""Records of a run."""

import contextlib
import pathlib

import pytest

from dssn_jax.workdir import files, recorder, records


def record(workdir, after, **losses):
    """Records a loss at each step, after those up to `after` that there are."""
    closing = contextlib.closing
    with closing(files.Folder(workdir)) as folder, closing(recorder.Recorder(folder, after)) as record:
        for step, loss in losses.items():
            record.scalars(int(step.removeprefix("step")), {"loss": loss})


def recorded(workdir):
    return [(line["step"], line["loss"]) for line in records.read_metrics(workdir)]


def test_recorder_drops_what_came_after_the_resumed_step(tmp_path):
    record(tmp_path, 0, step1=0.5, step2=1.0, step3=1.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # A line cut by a kill.
    record(tmp_path, 2, step3=9.0)
    assert recorded(tmp_path) == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_numbers_by_class(tmp_path):
    with contextlib.closing(files.Folder(tmp_path)) as folder, contextlib.closing(recorder.Recorder(folder, 0)) as log:
        log.scalars(1, {"loss": 0.5, "pseudo_labels": {"road": 25.0, "l\u2028ine": 0.0}})
    (line,) = records.read_metrics(tmp_path)
    assert line["loss"] == 0.5 and line["pseudo_labels"] == [25.0, 0.0]
    (board,) = (tmp_path / "tensorboard").iterdir()
    assert b"pseudo_labels/road" in board.read_bytes() and "\u2028".encode() not in board.read_bytes()


def test_damaged_lines_are_skipped_and_counted(tmp_path, caplog):
    record(tmp_path, 0, step1=0.5, step2=1.0)
    first, second = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    damaged = [
        b'{"step": 1, "lo\n', bytes(300) + b"\n", b"\xff\xfe{}\n", b"\n", b'{"loss": 1.0}\n', b"[1]\n", b"3\n",
        b'{"step": "2", "seconds": 1.0}\n', b'{"step": true, "seconds": 1.0}\n', b'{"step": 2}\n',
        b'{"step": 2, "seconds": null}\n', b'{"step": 2, "seconds": 1.0, "loss": "low"}\n', b"[" * 100_000 + b"\n",
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes(first + b"".join(damaged) + second)
    with caplog.at_level("WARNING", "dssn"):
        assert recorded(tmp_path) == [(1, 0.5), (2, 1.0)]
    assert [entry.getMessage() for entry in caplog.records] == [
        f"left out: {tmp_path / 'metrics.jsonl'}: 13 damaged of 15 lines"
    ]
    record(tmp_path, 2, step3=9.0)
    assert recorded(tmp_path) == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_nothing_is_written_to_tensorboard_before_the_first_record(tmp_path):
    record(tmp_path, 0)
    assert not (tmp_path / "tensorboard").exists()
    record(tmp_path, 0, step1=0.5)
    record(tmp_path, 1, step2=0.25)  # Within the same second.
    boards = [path.read_bytes() for path in (tmp_path / "tensorboard").iterdir()]
    assert len(boards) == 2 and all(b"loss" in board for board in boards)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file(tmp_path):
    with contextlib.closing(files.Folder(tmp_path)) as folder:
        record = recorder.Recorder(folder, 0)
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"No space left on device: '.*/metrics.jsonl'"):
            record.scalars(1, {"loss": 1.0})
