"""`experiments.compare`: what its variants set, which runs it skips, and its statistics against NumPy."""

import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from configs import shapes
from configs.checks import ConfigError, differences
from configs.methods import METHODS
from dssn_jax.distributed import PreemptedError
from dssn_jax.evaluation import metrics
from dssn_jax.methods import method as methods
from dssn_jax.training.loop import DivergedError
from dssn_jax.validate import validate_training
from dssn_jax.workdir import checkpoint, records
from experiments import compare, compare_plots, compare_results, compilations, prediction_picture
from input_pipeline.batch import labeled_rows

CONFIG = "configs/shapes.py:steps=20"
ROOT = pathlib.Path(__file__).parents[2]
NEVER = math.inf
# Classes of the shapes by pixels in the made-up validation images: ring and cross are the rarest.
PIXELS = np.array([700, 120, 100, 60, 10, 30])
# Variant -> names of the terms of DSSN that it lacks.
LACKING = {
    "dssn-no-image-contrast": {"image"},
    "dssn-no-feature-contrast": {"feature"},
    "dssn-no-feature-views": {"fp1", "fp2", "feature"},
}


@pytest.fixture
def comparison():
    return compare.Comparison(CONFIG, {})


@pytest.fixture
def keep_programs(monkeypatch):
    """Keeps compiled programs for other tests of this process."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)


class FakeTraining:
    """Writes the files of a training run, with random scores; can stop at a run, or diverge in runs by name."""

    def __init__(self, stop_at: int | None = None, diverging: str = ""):
        self.names, self._stop_at, self._diverging = [], stop_at, diverging
        self._random = np.random.default_rng(0)

    def __call__(self, config, workdir, deadline):
        self.names.append(workdir.name)
        workdir.mkdir(parents=True, exist_ok=True)
        records.write_json(workdir / "config.json", json.loads(config.to_json()))
        images = {"labeled": config.data.shapes.labeled, "unlabeled": 512, "val": 128}
        records.write_json(workdir / "run.json", {"images": images, "steps": config.train.steps, "devices": "1 x cpu"})
        if len(self.names) == self._stop_at:
            raise PreemptedError("stopped")
        if self._diverging and self._diverging in workdir.name:
            raise DivergedError("not finite")
        scores = checkpoint.new_scores()
        for step in (10, 20):
            (workdir / "checkpoints" / str(step)).mkdir(parents=True)
            confusions = {name: self._confusion() for name in self._networks(config)}
            evaluated = {name: metrics.scores_of(each, config.data.classes) for name, each in confusions.items()}
            metrics.update_scores(scores, step, evaluated)
        records.write_json(
            workdir / "confusion.json", {"step": 20, **{name: each.tolist() for name, each in confusions.items()}}
        )
        summary = {"steps": 20, "seconds": 7.0, **scores}
        records.write_json(workdir / "summary.json", summary)
        return summary

    def _networks(self, config) -> list[str]:
        return ["student", "teacher"] if config.method.teacher == "ema" else ["student"]

    def _confusion(self) -> np.ndarray:
        """The same pixels of each true class, scattered at random over the predicted ones."""
        shares = self._random.dirichlet(np.ones(6), size=6)
        return np.stack([self._random.multinomial(*row) for row in zip(PIXELS, shares, strict=True)])


def execute(comparison, out, training, runs, deadline=NEVER, keep="best"):
    compare.prepare_folder(out, comparison, "the command")
    return compare.execute_all(comparison, runs, out, keep, deadline, training)


@pytest.mark.parametrize("file", ["configs/shapes.py", "configs/camvid.py"])
def test_variants_differ_in_one_part_and_train_on_equally_many_images(file):
    comparison, built, images = (
        compare.Comparison(file, {"data.labeled_batch": "4", "data.unlabeled_batch": "4"}),
        {},
        set(),
    )
    for name in compare.choose_variants(["*"], comparison, "8" if "shapes" in file else "1_8"):
        config = comparison.configure(compare.VARIANTS[name])
        validate_training(config, device_count=1)
        built[name] = methods.from_config(config, steps_per_epoch=10)
        if not name.startswith("fixmatch_balanced"):
            images.add(labeled_rows(config) + config.data.unlabeled_batch * built[name].uses_unlabeled)
        assert config.train.steps == comparison.configure(compare.VARIANTS["dssn"]).train.steps
    assert images == {8}
    dssn = built["dssn"]
    for name, lacking in LACKING.items():
        streams = tuple(stream for stream in dssn.streams if stream.name not in lacking)
        contrasts = tuple(contrast for contrast in dssn.contrasts if contrast.name not in lacking)
        assert built[name] == dataclasses.replace(dssn, streams=streams, contrasts=contrasts)
    assert built["dssn-no-teacher"] == dataclasses.replace(dssn, teacher="student_eval", ema=None)
    threshold = built["dssn-threshold"]
    assert threshold == dataclasses.replace(dssn, selection=threshold.selection)
    assert threshold.selection.threshold == 0.95


def test_methods_are_chosen_by_patterns():
    comparison = compare.Comparison("configs/shapes.py", {})
    assert compare.choose_variants(METHODS, comparison, "8") == list(METHODS)
    chosen = compare.choose_variants(["supervised", "dssn-no-*", "dssn-no-teacher"], comparison, "8")
    assert chosen == ["supervised", *(name for name in compare.VARIANTS if name.startswith("dssn-no-"))]
    with pytest.raises(ConfigError, match="unknown method 'dsn'; did you mean 'dssn'"):
        compare.choose_variants(["supervised", "dsn"], comparison, "8")


def test_the_partner_that_the_config_has_is_no_variant():
    shapes_, camvid = compare.Comparison("configs/shapes.py", {}), compare.Comparison("configs/camvid.py", {})
    assert "dssn-partner-same" in compare.choose_variants(["*"], shapes_, "8")
    assert "dssn-partner-other" not in compare.choose_variants(["*"], shapes_, "8")
    assert "dssn-partner-other" in compare.choose_variants(["*"], camvid, "1_8")
    with pytest.raises(ConfigError, match="dssn-partner-same: the same as dssn"):
        compare.choose_variants(["dssn", "dssn-partner-same"], camvid, "1_8")


def test_configurations_are_those_of_the_command_line():
    comparison = compare.Comparison("configs/shapes.py:crop=33", {"data.scale": "(0.5, 1.0)", "optimizer.lr": "1"})
    run = compare.Run("unimatch", "32", {"method.threshold": "0.8"}, 2)
    found = comparison.configure_run(run)
    expected = shapes.get_config("method=unimatch,labeled=32,crop=33")
    expected.update({"seed": 2, "optimizer": {"lr": 1.0}, "method": {"threshold": 0.8}, "train": {"pictures": 0}})
    expected.data.scale = (0.5, 1.0)
    assert not differences(json.loads(expected.to_json()), json.loads(found.to_json()))


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("configs/shape.py", {}, "did you mean 'configs/shapes.py'"),
        ("configs/shapes.py:label=3", {}, "did you mean 'labeled'"),
        ("configs/shapes.py", {"optimizer.rl": "1"}, "unknown config key 'optimizer.rl'"),
        ("configs/shapes.py", {"train.steps": "many"}, "train.steps=many"),
    ],
)
def test_mistakes_are_named(config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        compare.Comparison(config, overrides).configure(compare.VARIANTS["dssn"], "8")


def test_settings_and_grids_that_would_confuse_runs_are_refused():
    assert compare.parse_settings(["config.a.b=1,2", "c=x=y"], "--grid") == {"a.b": "1,2", "c": "x=y"}
    for text in ("optimizer.lr", "optimizer.lr=", "seed=3"):
        with pytest.raises(ConfigError, match="--set"):
            compare.parse_settings([text], "--set")
    with pytest.raises(ConfigError, match="dssn-threshold"):
        compare.plan(["dssn-threshold"], ["8"], {"method.selection": ["threshold", "class_aware"]}, 1)


def test_the_first_seed_comes_first_and_names_differ():
    runs = compare.plan(["supervised", "dssn"], ["4", "8"], {"optimizer.lr": ["0.1", "0.2"]}, 3)
    assert [run.seed for run in runs] == [0] * 8 + [1] * 8 + [2] * 8
    assert len({run.name for run in runs}) == 24


def test_stopped_comparisons_go_on(comparison, keep_programs, tmp_path):
    runs = compare.plan(["supervised", "dssn"], ["4"], {}, 2)
    training = FakeTraining(stop_at=3)
    with pytest.raises(PreemptedError):  # Not by the deadline.
        execute(comparison, tmp_path, training, runs)
    assert training.names == [run.name for run in runs[:3]]
    assert execute(comparison, tmp_path, FakeTraining(), runs, deadline=0.0) == 2
    training = FakeTraining()
    assert execute(comparison, tmp_path, training, runs) == 0
    assert training.names == [run.name for run in runs[2:]]
    training = FakeTraining()
    assert execute(comparison, tmp_path, training, compare.plan(["dssn"], ["4", "8"], {}, 1)) == 0
    assert training.names == ["dssn_8_seed0"]


def test_what_changed_is_said_before_anything_runs(comparison, keep_programs, tmp_path):
    runs, training = compare.plan(["dssn"], ["4"], {}, 2), FakeTraining()
    execute(comparison, tmp_path, training, runs[:1])
    with pytest.raises(ConfigError, match="config.train.steps: 20, now 30"):
        execute(compare.Comparison("configs/shapes.py:steps=30", {}), tmp_path, training, runs)
    execute(compare.Comparison(CONFIG, {"data.threads": "3"}), tmp_path, training, runs[:1])  # Changes no score.
    path = tmp_path / "runs" / runs[0].name / "config.json"
    content = json.loads(path.read_text())
    content["method"]["threshold"] = 0.5
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"dssn_4_seed0 .*config.method.threshold: 0.5, now 0.95"):
        execute(comparison, tmp_path, training, runs)
    assert training.names == ["dssn_4_seed0"]


def test_values_that_a_run_chose_are_no_changes(keep_programs, tmp_path):
    """Keys that were left unset, such as the pixels of classes, have values in its configuration."""
    comparison = compare.Comparison(CONFIG, {"data.labeled_sampling": "rare", "optimizer.lr": "0.0"})
    runs, training = compare.plan(["dssn"], ["4"], {}, 1), FakeTraining()
    execute(comparison, tmp_path, training, runs)
    path = tmp_path / "runs" / runs[0].name / "config.json"
    content = json.loads(path.read_text())
    content["data"]["class_pixels"], content["optimizer"]["lr"] = [1, 2, 3, 4, 5, 6], 0.02
    path.write_text(json.dumps(content))
    execute(comparison, tmp_path, training, runs)
    assert training.names == ["dssn_4_seed0"]


@pytest.mark.parametrize("keep", compare.KEEP)
def test_checkpoints_that_stay(comparison, keep_programs, tmp_path, keep):
    runs = compare.plan(["dssn"], ["4"], {}, 1)
    execute(comparison, tmp_path, FakeTraining(), runs, keep=keep)
    workdir = tmp_path / "runs" / runs[0].name
    best = str(json.loads((workdir / "summary.json").read_text())["best_step"])
    expected = {"best": {best}, "all": {"10", "20"}, "none": set()}
    assert {folder.name for folder in (workdir / "checkpoints").iterdir()} == expected[keep]


def test_statistics_equal_numpy(comparison, keep_programs, tmp_path):
    runs = compare.plan(["supervised", "dssn"], ["4"], {"optimizer.lr": ["0.1", "0.2"]}, 3)
    execute(comparison, tmp_path, FakeTraining(diverging="dssn_4_optimizer.lr=0.2_seed1"), runs)

    def score_of(run, network, which):
        summary = json.loads((tmp_path / "runs" / run.name / "summary.json").read_text())
        return summary[network][which]

    rows = compare_results.summarize(compare_results.read(tmp_path))
    expected, chosen = {}, {}
    for row in rows:
        ours = [run for run in runs if (run.variant, run.values) == (row["variant"], row["values"])]
        if row["diverged"]:
            assert row["diverged"] == 1 and row["values"] == {"optimizer.lr": "0.2"} and row["last"].n == 2
            assert not row["chosen"]  # Fewer seeds than the other value has.
            continue
        networks = ["student", "teacher"] if row["variant"] == "dssn" else ["student"]
        best = [max(score_of(run, network, "best")["miou"] for network in networks) for run in ours]
        last = [score_of(run, networks[-1], "last")["miou"] for run in ours]
        for name, values in (("best", best), ("last", last)):
            assert row[name].mean == pytest.approx(np.mean(values))
            assert row[name].std == pytest.approx(np.std(values, ddof=1))
        assert row["student_best"].mean == pytest.approx(
            np.mean([score_of(run, "student", "best")["miou"] for run in ours])
        )
        ring = [score_of(run, networks[-1], "last")["iou"]["ring"] for run in ours]
        assert row["iou"]["ring"].mean == pytest.approx(np.mean(ring))
        expected.setdefault(row["variant"], []).append((np.mean(last), np.var(last, ddof=1), row))
        if row["chosen"]:
            chosen[row["variant"]] = row
    assert chosen["supervised"] is max(expected["supervised"], key=lambda found: found[0])[2]
    mean, variance, _ = max(expected["supervised"], key=lambda found: found[0])
    ((ours, our_variance, row),) = expected["dssn"]
    over = row["over_baseline"]["last"]
    assert over["points"] == pytest.approx(ours - mean)
    assert over["cohens_d"] == pytest.approx((ours - mean) / np.sqrt((variance + our_variance) / 2))
    rare = compare_results.rare_classes(compare_results.read(tmp_path))
    assert list(rare) == ["ring", "cross"] and rare["ring"] == pytest.approx(10 / PIXELS.sum())


def test_tables_are_made_from_the_runs_alone(comparison, keep_programs, tmp_path):
    runs = compare.plan(["supervised", "dssn", "dssn-no-teacher"], ["4", "8"], {}, 2)
    execute(comparison, tmp_path, FakeTraining(), runs)
    names = ("results.json", "results.md")
    first = {name: (tmp_path / name).read_text() for name in names}
    for name in names:
        (tmp_path / name).unlink()
    rows = compare_results.write_tables(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in names} == first
    row = next(row for row in rows if row["variant"] == "dssn")
    text = f"{row['last'].mean:.2f} ± {row['last'].std:.2f}"
    assert text in first["results.md"] and "`method.teacher=student_eval`" in first["results.md"]
    supervised, dssn = (
        next(each for each in rows if (each["variant"], each["split"]) == (name, row["split"]))["iou"]["ring"].mean
        for name in ("supervised", "dssn")
    )
    assert f" {dssn:.1f} ({dssn - supervised:+.1f}) " in first["results.md"]

    path = tmp_path / "runs" / "dssn_4_seed0" / "summary.json"
    summary = json.loads(path.read_text())
    summary["teacher"]["last"]["miou"] += 10
    path.write_text(json.dumps(summary))
    changed = next(row for row in compare_results.write_tables(tmp_path) if row["variant"] == "dssn")
    assert changed["last"].mean == pytest.approx(row["last"].mean + 5)
    text = f"{changed['last'].mean:.2f} ± {changed['last'].std:.2f}"
    assert text not in first["results.md"] and text in (tmp_path / "results.md").read_text()


def test_a_file_of_results_in_place_of_the_comparison_is_named(comparison, keep_programs, tmp_path):
    runs = compare.plan(["dssn"], ["4"], {}, 1)
    execute(comparison, tmp_path, FakeTraining(), runs)
    path = tmp_path / compare_results.COMPARISON
    path.write_text((tmp_path / "results.json").read_text())
    message = f"{re.escape(str(path))}: no dict 'base' in it"
    with pytest.raises(records.WorkdirError, match=message):
        compare.prepare_folder(tmp_path, comparison, "the command")
    path.write_text(json.dumps({"config": CONFIG, "commands": "one", "base": {}}))
    with pytest.raises(records.WorkdirError, match="no list 'commands' in it"):
        compare_results.write_tables(tmp_path)
    path.unlink()
    training = FakeTraining()
    execute(comparison, tmp_path, training, runs)
    assert not training.names and "base" in json.loads(path.read_text())


@pytest.mark.slow
def test_devices_that_are_not_there_end_a_comparison(tmp_path):
    out = tmp_path / "runs"
    command = ["-m", "experiments.compare", f"--config={CONFIG}", "--splits", "4", f"--out={out}"]
    environment = {**os.environ, "JAX_PLATFORMS": "gpus"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and not out.exists() and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: JAX found no devices (JAX_PLATFORMS=gpus)")


def test_the_plot_shows_means_and_deviations(comparison, keep_programs, tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    execute(comparison, tmp_path, FakeTraining(), compare.plan(["supervised", "dssn"], ["4", "8"], {}, 2))
    rows = compare_results.write_tables(tmp_path)
    axes = figure.subplots()
    compare_plots.draw_curves(axes, rows, "last")
    for line, name in zip(axes.containers, ("supervised", "dssn"), strict=True):
        ours = [row for row in rows if row["variant"] == name]
        assert line.get_label() == name
        assert line[0].get_xdata().tolist() == [4, 8]
        assert line[0].get_ydata().tolist() == [row["last"].mean for row in ours]
        low = [segment[0, 1] for segment in line[2][0].get_segments()]
        assert low == pytest.approx([row["last"].mean - row["last"].std for row in ours])


@pytest.fixture
def cache_settings():
    """Leaves JAX's compilation cache to other tests as it was."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.slow
def test_a_real_run_is_trained_tabled_and_pictured(cache_settings, keep_programs, monkeypatch, tmp_path):
    settings = (
        "data.shapes.size=48 data.shapes.unlabeled=8 data.shapes.val=4 data.labeled_batch=4 data.unlabeled_batch=8 "
        "model.decoder_channels=16 model.aspp_dilations=(2,) train.eval_every=2"
    )
    config = "configs/shapes.py:encoder=resnet10w16,crop=33,steps=2"
    command = f"compare --config={config} --methods supervised --splits 4 --seeds 1 --set {settings} --out={tmp_path}"
    monkeypatch.setattr("sys.argv", command.split())
    compare.main()
    assert "| supervised |" in (tmp_path / "results.md").read_text()
    picture = tmp_path / "picture.png"
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "runs/supervised_4_seed0"), "--rows=2", f"--to={picture}"])
    prediction_picture.main()
    with Image.open(picture) as image:
        assert image.size == (3 * 3 * 50, 3 * 2 * 50)  # Magnified columns and rows of 48 pixels and a gap of 2.


def test_programs_are_compiled_once(cache_settings, tmp_path):
    compilations.keep_programs(tmp_path)
    programs = compilations.Compilations()
    scale = float(np.random.default_rng().random())  # A program that no earlier run of the tests has compiled.
    counts = []
    for _ in range(2):
        jax.jit(lambda x: x * scale)(np.ones(3)).block_until_ready()
        counts.append(programs.take())
    assert (counts[0]["compiled"], counts[0]["loaded"]) == (1, 0)
    assert (counts[1]["compiled"], counts[1]["loaded"]) == (0, 1)
