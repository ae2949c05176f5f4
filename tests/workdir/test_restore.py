"""Work directories are read back, and unfit ones are refused."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest

from configs.checks import ConfigError
from dssn_jax.learner import learner as learners
from dssn_jax.workdir import checkpoint, records, restore
from dssn_jax.workdir.records import WorkdirError, write_json


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """Returns a work directory with one checkpoint, and its state."""
    workdir, config = tmp_path_factory.mktemp("trained"), tiny_config()
    state, settings = learners.build(config).init_state(), json.loads(config.to_json())
    with contextlib.closing(checkpoint.Checkpointer(workdir)) as saved:
        saved.save(3, state, {"config": settings, "scores": {"best_step": 3}})
        saved.wait()
    write_json(workdir / "config.json", settings)
    return workdir, jax.device_get(state)


def test_the_whole_state_is_restored(trained):
    workdir, state = trained
    restored = restore.restore(workdir)
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)
    jax.tree.map(np.testing.assert_array_equal, restored.networks, state.networks())
    assert restored.step == 3


def test_another_normalization_is_refused(trained, tiny_config):
    workdir, _ = trained
    for key in ("mean", "std"):
        changed = tiny_config(**{f"data__{key}": (0.25, 0.5, 0.5)})
        with pytest.raises(
            ConfigError, match=rf"with another normalization: config.data.{key}: .*, now .0.25, 0.5, 0.5"
        ):
            restore.restore(workdir, config=changed)


def test_other_keys_that_change_scores_are_told(trained, tiny_config, caplog):
    def warned():
        return [record.getMessage().partition(": ")[2] for record in caplog.records if record.name == "dssn"]

    workdir, _ = trained
    with caplog.at_level("WARNING", "dssn"):
        restore.restore(workdir, config=tiny_config(data__root="/elsewhere", eval__flip=True, model__remat=True))
        assert not warned()
        restore.restore(workdir, config=tiny_config(data__ignore=7, model__dtype="bfloat16"))
    messages = warned()
    assert messages == ["config.data.ignore: 255, now 7", "config.model.dtype: 'float32', now 'bfloat16'"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged, not JSON"),
        (b"\xff\x00", "damaged, not JSON"),
        ("[" * 100_000, "damaged, not JSON"),
        ("[]", "holds a list; expected a JSON object"),
        ('{"data": 5}', "not a configuration of this program"),
        ('{"seed": "one"}', "not a configuration of this program"),
        ('{"seed": null}', "not a configuration of this program"),
        ('{"unknown": 1}', "not a configuration of this program"),
        ('{"data": {"unknown": 1}}', "not a configuration of this program"),
        ('{"data": {"mean": [0.5, "x"]}}', "not a configuration of this program"),
        ('{"train": {"steps": -3}}', "not a configuration of this program"),
    ],
)
def test_configurations_that_are_none_are_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(WorkdirError, match=f"config.json: {message}") as refused:
        records.read_config(tmp_path)
    assert "\n" not in str(refused.value)


def test_checkpoints_of_another_run_are_refused(trained, tmp_path):
    """Such as copied ones, which were trained on other images than config.json tells."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["data"]["mean"] = [0.0, 0.0, 0.0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for given in (None, records.read_config(tmp_path)):
        with pytest.raises((ConfigError, WorkdirError), match="another normalization"):
            restore.restore(tmp_path, config=given)
    with pytest.raises(WorkdirError, match="checkpoints/3 is of another run than config.json"):
        restore.restore(tmp_path)
    (tmp_path / "config.json").unlink()
    assert restore.restore(tmp_path).learner.config.data.mean == (0.485, 0.456, 0.406)


def test_summaries_tell_finished_runs(tmp_path):
    records.check_unfinished(tmp_path)
    for content, summary in (("{}", None), ("[]", None), ("\x00", None), ('{"steps": 12}', {"steps": 12})):
        (tmp_path / "summary.json").write_text(content)
        assert records.summary_of(tmp_path, 12) == summary and records.summary_of(tmp_path, 13) is None
        with pytest.raises(
            WorkdirError, match="summary.json: of a finished run, whose checkpoints are gone; remove it"
        ):
            records.check_unfinished(tmp_path)
