"""Log lines, and what becomes of the warnings of libraries."""

import logging
import pathlib
import warnings

import absl.logging
import pytest

from dssn_jax.workdir import logs


def test_duration():
    assert [logs.duration(seconds) for seconds in (0, 61, 3600 * 5 + 62)] == ["0:00", "1:01", "5:01:02"]


@pytest.fixture
def quiet():
    """Calls `quiet_libraries` and undoes it."""
    loggers = [logging.getLogger(name) for name in logs._LIBRARIES]
    before = [(each.handlers, each.propagate) for each in loggers]
    logging.captureWarnings(False)
    logs.quiet_libraries()
    yield
    logging.captureWarnings(False)
    for each, (handlers, propagate) in zip(loggers, before, strict=True):
        each.handlers, each.propagate = handlers, propagate


def test_warnings_of_libraries_are_kept_in_a_file_and_not_shown(quiet, tmp_path, capfd):
    stop = logs.keep_library_warnings(tmp_path)
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
    before = list(logs.logger.handlers)
    undo = logs.log_to(tmp_path)
    logs.logger.info("to both")
    undo()
    assert logs.logger.handlers == before
    logs.logger.info("to none")
    assert (tmp_path / "log.txt").read_text().split(maxsplit=1)[1] == "to both\n"
    assert capfd.readouterr().out.endswith("to both\n")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    undo = logs.log_to(tmp_path)
    with pytest.raises(OSError, match=r"No space left on device: '.*/log.txt'"):
        logs.logger.info("a line")
    undo()
