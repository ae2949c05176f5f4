"""Estimates of `benchmarks.scaling` from the collectives of a compiled step."""

import json

import pytest

from benchmarks import scaling

NETWORK = {"machine": 8, "bytes_per_second": {"machine": 1e9, "beyond": 1e8}, "seconds_per_message": 1e-3}
ROW = {"kind": "all-reduce", "dtype": "f32", "group": 0, "count": 3, "MB": 4, "overlapped": 1, "overlapped_MB": 3}


def test_the_estimate_adds_up():
    """Two collectives of 1 MB in all are waited for; one of 3 MB runs beside 10 ms of computation."""
    result = {"roofline_ms": 10.0, "collectives": [ROW]}
    row = scaling.estimate(result, NETWORK, 8)
    assert (row["collectives"], row["MB"], row["compute ms"]) == (3, 4, 10)
    assert row["GB sent"] == pytest.approx(2 * 7 / 8 * 4e-3)
    assert row["waited ms"] == pytest.approx(2 * 7 / 8 * 1 + 2 * 2 * 3)
    assert row["hidden ms"] == pytest.approx(2 * 7 / 8 * 3 + 2 * 3)
    assert row["step ms"] == pytest.approx(10 + 13.75 + 1.25) and row["share"] == pytest.approx(10 / 25)
    assert row["share, 8 x"] == pytest.approx(80 / 93.75)  # All that is hidden fits.
    far = scaling.estimate(result, NETWORK, 64)
    assert far["waited ms"] == pytest.approx(2 * 63 / 64 * 10 + 2 * 2 * 6)


def test_groups_keep_their_size_and_gathers_send_half():
    gather = ROW | {"kind": "all-gather", "group": 2, "count": 1, "overlapped": 0, "overlapped_MB": 0}
    row = scaling.estimate({"roofline_ms": 1.0, "collectives": [gather]}, NETWORK, 8)
    assert row["GB sent"] == pytest.approx(4e-3 / 2) and row["waited ms"] == pytest.approx(2 + 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no result of this version"),
        (json.dumps({"collectives": [ROW]}), "no result of this version"),
        (json.dumps({"devices": 1, "collectives": []}), "a step of one device"),
    ],
)
def test_other_files_are_refused(tmp_path, monkeypatch, text, message):
    file = tmp_path / "step.json"
    file.write_text(text)
    monkeypatch.setattr("sys.argv", ["scaling", str(file)])
    with pytest.raises(SystemExit, match=message):
        scaling.main()
