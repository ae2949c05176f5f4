"""Makes the five additions of docs/extending.md, from the code in the page, in a copy of the repository."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs/extending.md"
PACKAGES = ("configs", "dssn_jax", "input_pipeline")
# Where the page says that code goes, other than to the end of the file -> the line it follows, or (False) precedes.
PLACES = {
    "in _MODEL": ("    encoder=Key(", False),
    "in METHODS": ("METHODS = {\n", True),
    "at the top of RULES": ("RULES = [\n", True),
}
FILES = {
    "An encoder and a decoder": 5,
    "A method": 2,
    "A data set": 1,  # And a row in the README.
    "An optimizer": 1,  # And configs/defaults.py, for new options.
    "A metric": 1,
}


def add(code: str, file: pathlib.Path, place: str) -> None:
    """Adds a code block of the page to a file."""
    if not file.exists() or not place:
        file.write_text((file.read_text() + "\n\n" if file.exists() else "") + code)
        return
    line, after = PLACES[place]
    indent = re.match(" *", line)[0] if not after else "    "
    code = "".join(indent + each if each.strip() else each for each in code.splitlines(keepends=True))
    text = file.read_text()
    assert text.count(line) == 1
    file.write_text(text.replace(line, line + code if after else code + line))


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """Returns the extended copy, and the files that each section of the page touched."""
    copy, touched = tmp_path_factory.mktemp("extended"), {}
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "main.py", copy)
    for section in re.split(r"(?m)^## ", PAGE.read_text())[1:]:
        title, _, body = section.partition("\n")
        for path, place, code in re.findall(r"```python\n# ([\w/]+\.py)(?:, ([^\n]*))?\n(.*?)```", body, re.S):
            touched.setdefault(title, set()).add(path)
            add(code, copy / path, place)
    return copy, touched


def test_each_addition_touches_as_few_files_as_promised(extended):
    _, touched = extended
    assert {title: len(files) for title, files in touched.items()} == FILES


@pytest.mark.slow
def test_a_run_with_all_additions_trains_evaluates_and_converts(extended, tmp_path):
    copy, _ = extended

    def run(*arguments):
        command = [sys.executable, "main.py", *arguments]
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        return result.stdout

    overrides = [f"--config.{key}={value}" for key, value in {
        "model.decoder": "pointwise", "method.selection": "running", "optimizer.name": "lion", "optimizer.lr": "0.001",
        "eval.metric": "dice", "data.labeled_batch": 4, "data.unlabeled_batch": 4, "data.shapes.val": 6,
        "data.shapes.unlabeled": 16, "data.shapes.size": 48,
    }.items()]  # fmt: skip
    config = ["--config=configs/shapes.py:encoder=patches,crop=48,method=mean_teacher,steps=4", *overrides]
    workdir, file = tmp_path / "run", tmp_path / "weights.safetensors"
    assert "dice" in run(*config, f"--workdir={workdir}").lower()
    run("--mode=eval", *config, f"--workdir={workdir}")
    run("--mode=convert", f"--from={workdir}", f"--to={file}", "--checkpoint=latest")
    import safetensors

    with safetensors.safe_open(file, framework="np") as tensors:
        names = set(tensors.keys())
    assert {"backbone.patch_embed.proj.weight", "backbone.mlp.weight", "classifier.bias"} <= names
