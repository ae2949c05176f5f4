"""The networks of docs/models, by their list: they convert and evaluate as docs/results says."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from dssn_jax import commands

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "docs/models"
MODELS = json.loads((FOLDER / "models.json").read_text())


def settings(model: dict) -> list[str]:
    return [f"--config={model['config']}", *model["overrides"]]


def test_the_list_is_of_all_files():
    assert {path.name for path in FOLDER.glob("*.safetensors")} == {model["file"] for model in MODELS}
    assert all(path.stat().st_size < 25e6 for path in FOLDER.iterdir())


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["file"])
def test_entries_are_configurations_of_their_method_and_split(model):
    assert set(model) == {"file", "method", "split", "config", "overrides"}
    _, flags = commands.parse(["--mode=check", *settings(model)])
    config = flags["config"].value
    assert (config.method.name, config.data.split) == (model["method"], model["split"])
    assert not config.model.pretrained and not config.data.root.startswith("/")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["file"])
def test_models_evaluate_on_a_folder_with_another_list(model, tmp_path, monkeypatch):
    """On noise: the scores are those of chance, but of all pixels."""
    monkeypatch.chdir(ROOT)
    random, lines = np.random.default_rng(0), []
    for folder in ("images", "masks", "splits"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        Image.fromarray(random.integers(0, 255, (72, 96, 3), np.uint8)).save(tmp_path / f"images/{number}.png")
        Image.fromarray(random.integers(0, 11, (72, 96), np.uint8)).save(tmp_path / f"masks/{number}.png")
        lines.append(f"images/{number}.png masks/{number}.png\n")
    (tmp_path / "splits/val.txt").write_text("".join(lines))
    run = tmp_path / "run"
    assert commands.run(["--mode=convert", *settings(model), f"--from={FOLDER / model['file']}", f"--to={run}"]) == 0
    assert commands.run(["--mode=eval", *settings(model), f"--config.data.root={tmp_path}", f"--workdir={run}"]) == 0
    scores = json.loads((run / "eval_0.json").read_text())
    assert all(0 < each["miou"] < 20 for name, each in scores.items() if name in ("student", "teacher"))
