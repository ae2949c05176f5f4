"""Records of a run, and what becomes of the warnings of libraries."""

import json
import logging
import warnings

import absl.logging
import pytest

from dssn_jax.workdir import files, recorder


def test_recorder_drops_what_came_after_the_resumed_step(tmp_path):
    record = recorder.Recorder(files.Folder(tmp_path), 0)
    for step in (1, 2, 3):
        record.scalars(step, {"loss": step / 2})
    record.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # A line cut by a kill.
    record = recorder.Recorder(files.Folder(tmp_path), 2)
    record.scalars(3, {"loss": 9.0})
    record.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0), (3, 9.0)]


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
