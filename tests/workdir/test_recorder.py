import json

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
