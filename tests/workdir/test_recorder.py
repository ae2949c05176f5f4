"""Records of a run, and what becomes of the warnings of libraries."""

import contextlib
import logging
import pathlib
import warnings

import absl.logging
import pytest

from dssn_jax.workdir import files, recorder


def record(workdir, after, **losses):
    """Records a loss at each step, after those up to `after` that there are."""
    closing = contextlib.closing
    with closing(files.Folder(workdir)) as folder, closing(recorder.Recorder(folder, after)) as record:
        for step, loss in losses.items():
            record.scalars(int(step.removeprefix("step")), {"loss": loss})


def recorded(workdir):
    return [(line["step"], line["loss"]) for line in recorder.read_metrics(workdir)]


def test_recorder_drops_what_came_after_the_resumed_step(tmp_path):
    record(tmp_path, 0, step1=0.5, step2=1.0, step3=1.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # A line cut by a kill.
    record(tmp_path, 2, step3=9.0)
    assert recorded(tmp_path) == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_numbers_by_class(tmp_path):
    with contextlib.closing(files.Folder(tmp_path)) as folder, contextlib.closing(recorder.Recorder(folder, 0)) as log:
        log.scalars(1, {"loss": 0.5, "pseudo_labels": {"road": 25.0, "l\u2028ine": 0.0}})
    (line,) = recorder.read_metrics(tmp_path)
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
    (tmp_path / "log.txt").symlink_to("/dev/full")
    undo = recorder.log_to(tmp_path)
    with pytest.raises(OSError, match=r"No space left on device: '.*/log.txt'"):
        recorder.logger.info("a line")
    undo()


def test_duration():
    assert [recorder.duration(seconds) for seconds in (0, 61, 3600 * 5 + 62)] == ["0:00", "1:01", "5:01:02"]


@pytest.fixture
def quiet():
    """Calls `quiet_libraries` and undoes it."""
    loggers = [logging.getLogger(name) for name in recorder._LIBRARIES]
    before = [(each.handlers, each.propagate) for each in loggers]
    logging.captureWarnings(False)
    recorder.quiet_libraries()
    yield
    logging.captureWarnings(False)
    for each, (handlers, propagate) in zip(loggers, before, strict=True):
        each.handlers, each.propagate = handlers, propagate


def test_warnings_of_libraries_are_kept_in_a_file_and_not_shown(quiet, tmp_path, capfd):
    stop = recorder.keep_library_warnings(tmp_path)
    assert not (tmp_path / "debug.txt").exists()
    absl.logging.warning("of orbax")
    absl.logging.info("a detail")
    logging.getLogger("jax._src.compiler").warning("of the compilation cache")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("of donation", stacklevel=1)
    stop()
    absl.logging.warning("after the run")
    text = (tmp_path / "debug.txt").read_text()
    for message in ("of orbax", "of the compilation cache", "of donation"):
        assert message in text
    assert "a detail" not in text and "after the run" not in text
    assert capfd.readouterr() == ("", "")


def test_the_log_is_undone(tmp_path, capfd):
    before = list(recorder.logger.handlers)
    undo = recorder.log_to(tmp_path)
    recorder.logger.info("to both")
    undo()
    assert recorder.logger.handlers == before
    recorder.logger.info("to none")
    assert (tmp_path / "log.txt").read_text().split(maxsplit=1)[1] == "to both\n"
    assert capfd.readouterr().out.endswith("to both\n")
