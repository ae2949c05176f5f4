"""Attacks at random in the suite, and the judge that decides what is good."""

import pytest

from tests.attacks import generators, harness
from tests.attacks.attack import Attack, Result, changes, judge, snapshot


@pytest.mark.slow
def test_200_attacks():
    """`python -m tests.attacks` makes more."""
    seed, count = 1, 200
    rows = list(harness.run(seed, range(count), [*generators.KINDS]))
    bad = [f"{row.kind} {row.index}: {row.name} [{row.mode}]: {row.text}" for row in rows if not row.good]
    assert len(rows) == count
    assert not bad, "\n".join([f"python -m tests.attacks --seed {seed} --count {count}", *bad])


def _judged(code: int | None, stderr: str = "", **options) -> bool:
    return judge(Attack("a", "eval", [], ("config.data.crop",)), Result(code, "", stderr, **options)).good


def test_good_outcomes():
    assert _judged(0)
    assert _judged(1, "error: config.data.crop is -1; expected 0 or more\n")


@pytest.mark.parametrize(
    ("code", "stderr", "options"),
    [
        (None, "", {"raised": "TypeError: x"}),
        (0, "Traceback (most recent call last):\n  ...\nOSError: x\n", {}),
        (0, "", {"changed": ("mine.txt",)}),
        (1, "", {}),
        (1, "config.data.crop is -1\n", {}),
        (1, "error: it does not work\n", {}),
        (1, "error: config.data.crop is -1\nand more\n", {}),
        (1, "warning: x\nerror: config.data.crop is -1\n", {}),
        (1, "error: config.data.crop is '\x1b[31m'\n", {}),
        (1, f"error: config.data.crop is {'9' * 5000}\n", {}),
    ],
)
def test_bad_outcomes(code, stderr, options):
    assert not _judged(code, stderr, **options)


def test_another_result_is_bad():
    for verdict, good in (("", True), ("other: a valid image", True), ("score is 1, not 2", False)):
        attack = Attack("a", "eval", [], (), verify=lambda stdout, verdict=verdict: verdict)
        assert judge(attack, Result(0, "", "")).good == good


def test_changes_of_the_users_files_are_seen(tmp_path):
    for name in ("kept.txt", "changed.txt", "removed.txt", "out/report.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    (tmp_path / "link").symlink_to("kept.txt")
    before = snapshot(tmp_path, (tmp_path / "out",))
    (tmp_path / "changed.txt").write_text("after")
    (tmp_path / "removed.txt").unlink()
    (tmp_path / "added").mkdir()
    (tmp_path / "out/report.html").write_text("after")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("changed.txt")
    seen = changes(before, snapshot(tmp_path, (tmp_path / "out",)))
    assert seen == ("'added' (added)", "'changed.txt' (changed)", "'link' (changed)", "'removed.txt' (removed)")
