"""The run report: its numbers, and the page in a browser."""

import base64
import io
import json
import os
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from configs.checks import ConfigError
from dssn_jax import commands
from dssn_jax.evaluation import metrics
from dssn_jax.report import charts, gallery, runs
from dssn_jax.report.page import report
from dssn_jax.training.run import plan, run_info
from dssn_jax.workdir import checkpoint, files, recorder, records
from dssn_jax.workdir.records import WorkdirError
from input_pipeline.pipeline import train_dataset
from input_pipeline.sources.open import open_sources
from tests.input_pipeline.own_images import make_root

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HEADLESS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000", "--window-size=1200,2600",
]  # fmt: skip


def record(config, workdir, steps):
    """Writes what training leaves after `steps` steps, with made-up numbers, which need no compilation."""
    rng, run = np.random.default_rng(0), plan(config)
    folder = files.Folder(workdir)
    record = recorder.Recorder(folder, 0)
    scores, state = checkpoint.new_scores(), run.learner.init_state()
    for step in range(1, steps + 1):
        names = ["loss", "loss_x", "lr", "grad_norm", "images_per_second", "waiting"]
        if config.method.strong_views:
            names += ["loss_s1", "loss_s2", "loss_fp1", "loss_fp2", "contrast_image", "contrast_feature"]
            names += ["mask_ratio", "mask_ratio_s1", "mask_ratio_s2"]
        values = {name: float(value) for name, value in zip(names, rng.random(len(names)), strict=True)}
        if config.method.strong_views:
            values["pseudo_labels"] = {name: 10.0 * step + k for k, name in enumerate(config.data.classes)}
        record.scalars(step, values)
        if step % config.train.eval_every == 0:
            counts = {network: rng.integers(100, size=(6, 6)) for network in state.networks()}
            scored = {network: metrics.scores_of(count, config.data.classes) for network, count in counts.items()}
            metrics.update_scores(scores, step, scored)
            record.evaluation(step, scored, counts)
    record.close()
    folder.close()
    saved, settings = checkpoint.Checkpointer(workdir), json.loads(config.to_json())
    saved.save(steps, state, {"config": settings, "scores": scores | {"best_step": steps}})
    saved.close()
    for name, content in (("config", settings), ("run", run_info(run)), ("summary", scores)):
        records.write_json(workdir / f"{name}.json", content)


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """The work directories of a finished DSSN run and a finished supervised run."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("dssn", "supervised"):
        (folder / method).mkdir()
        record(tiny_config(method), folder / method, 6)
    return folder


@pytest.fixture(scope="module")
def page(trained):
    return report([str(trained / "dssn"), str(trained / "supervised")])


def browse(page, folder):
    """Opens a page in a browser without network.

    Returns the DOM after its scripts, a screenshot as integers [H, W, 3], and the URLs of its requests to hosts.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    screenshot, log = folder / "page.png", folder / "requests.json"
    options = [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", f"--screenshot={screenshot}"]
    command = [browser, *HEADLESS, *options, "--dump-dom", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # The browser's own requests (for updates and the like) have no origin.
    urls = [event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"]
    return done.stdout, np.asarray(Image.open(screenshot).convert("RGB")).astype(int), [*filter(is_remote, urls)]


def is_remote(url):
    return not url.startswith(("file:", "data:", "blob:"))


def test_requests_of_a_page_are_recorded(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<img src="http://example.invalid/a.png">')
    assert "http://example.invalid/a.png" in browse(page, tmp_path)[2]


@pytest.mark.slow
def test_the_page_in_a_browser(page, tmp_path):
    dom, screenshot, requests = browse(page, tmp_path)
    assert requests == []
    scripts = re.compile(r"<(script|style)\b.*?</\1>", re.DOTALL)
    dom = scripts.sub("", dom)  # Only what is visible.
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", dom)
    # Charts: 3 scores, 8 losses, 3 selected shares, 4 of optimization and speed, 6 classes twice, bars, 3 matrices.
    assert len(re.findall(r'class="plot js-plotly-plot"', dom)) == 3 + 8 + 3 + 4 + 2 * 6 + 1 + 3
    assert len(re.findall(r'class="trace scatter', dom)) == 3 * 3 + (8 + 2) + 3 + 4 * 2 + 6 * 3 + 6
    assert len(re.findall(r'class="trace bars"', dom)) == 3
    assert len(re.findall(r'class="hm"', dom)) == 3
    for text in (
        "Pixel accuracy",
        "dssn",
        "supervised",
        "triangle",
        "cross",
        "loss_s2",
        "Worst validation images",
        "selected",
    ):
        assert re.search(rf">\s*{text}\b", dom), text
    # Charts have the font of the page.
    assert set(re.findall(r"<text[^>]*font-family: ([^,;]+)", dom)) == {"system-ui"}
    for index in (0, 1):  # The colors of both runs, of buttons and bars at least.
        color = np.array([int(charts.color(index)[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(screenshot - color).max(-1) < 3).sum() > 2000


def test_pictures_are_images_of_the_run(page, trained, tiny_config):
    encoded = re.findall(r'<img src="data:image/(?:png|jpeg);base64,([^"]+)"', page.read_text())
    pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in encoded]
    sizes = [picture.size for picture in pictures]
    best_and_worst, unlabeled, labeled = 2 * 2 * 3 * 3, 4 * 6, 2 * 4 * 3
    assert len(sizes) == best_and_worst + unlabeled + labeled
    assert sizes.count((48, 48)) == best_and_worst  # Whole images; the others are training crops.
    assert sizes.count((33, 33)) == unlabeled + labeled
    # The first run's validation pictures are followed by its training pictures, those of the last step.
    training = pictures[best_and_worst // 2 :]
    batch = train_dataset(open_sources(tiny_config()), tiny_config())[5]
    for i in range(4):
        np.testing.assert_array_equal(training[6 * i], batch.image_u[i])
        np.testing.assert_array_equal(training[unlabeled + 3 * i], batch.image_x[i])


def test_scores_are_those_of_the_summary(trained):
    for run in runs.read([str(trained / "dssn"), str(trained / "supervised")]):
        summary = json.loads((run.workdir / "summary.json").read_text())
        assert run.finished and run.steps == 6 and run.seconds > 0
        for network in run.networks:
            best, last = summary[network]["best"], summary[network]["last"]
            assert run.best(network) == (pytest.approx(best["miou"]), best["step"])
            assert run.last(network, "miou") == (pytest.approx(last["miou"]), last["step"])
            np.testing.assert_allclose(run.series[f"iou_{network}"].values[-1], list(last["iou"].values()))
            counts = run.confusions[network]
            union = counts.sum(0) + counts.sum(1) - np.diag(counts)
            np.testing.assert_allclose(100 * np.diag(counts) / np.maximum(union, 1), list(last["iou"].values()))
            percent = np.array(charts.confusion(run, network)["traces"][0]["z"])
            np.testing.assert_allclose(percent.sum(1)[counts.sum(1) > 0], 100, atol=0.05)


def test_shares_of_pseudo_labels_have_a_chart_per_class(page, trained):
    shown = runs.read([str(trained / "supervised"), str(trained / "dssn")])
    curves = charts.share_curves(shown)
    assert [curve["title"] for curve in curves] == list(shown[0].classes)
    for k, curve in enumerate(curves):
        (line,) = curve["traces"]  # The supervised run has none.
        assert line["x"] == [1, 2, 3, 4, 5, 6] and line["y"] == [10 * step + k for step in line["x"]]
        assert line["name"] == "dssn" and line["meta"]["run"] == 1
    titles = [chart["title"] for section in charts.curves(shown).values() for chart in section]
    assert "mask_ratio" in titles and "pseudo_labels" not in titles
    assert charts.share_curves(shown[:1]) == []
    assert "Pseudo-labeled pixels" in page.read_text()


def test_unfinished_runs(trained, tmp_path):
    """Before the first step, and without evaluation, data or checkpoint, the page shows what is recorded."""
    workdir = tmp_path / "going"
    workdir.mkdir()
    config = json.loads((trained / "dssn" / "config.json").read_text())
    config["data"] |= {"source": "folder", "root": "/nowhere", "split": "few"}
    (workdir / "config.json").write_text(json.dumps(config))
    text = report([str(workdir)], to=str(tmp_path / "page.html")).read_text()
    assert "No step was recorded yet" in text and "nothing recorded yet" in text

    lines = (trained / "dssn" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(line for line in lines if "miou" not in line)[:-30])
    text = report([str(workdir)]).read_text()
    assert "Not evaluated yet" in text and "loss_s2" in text and "5 of 6" in text
    assert re.search(r"No pictures: .*/nowhere", text) and "<img src" not in text
    assert [path.name for path in workdir.iterdir() if "part" in path.name] == []


def test_folders_that_are_no_runs(trained, tmp_path, capsys):
    run = str(trained / "dssn")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text('{"data": ')
    for workdirs, message in (
        ([run, str(tmp_path / "nowhere")], "nowhere: no such folder"),
        ([str(tmp_path), run], "no config.json in it"),
        ([str(tmp_path / "damaged")], "config.json: damaged"),
        ([run, f"{run}/../dssn"], "given twice"),
    ):
        with pytest.raises(WorkdirError, match=message):
            report(workdirs)
    assert commands.run(["--mode=report", f"--workdir={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no config.json in it" in error
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_labels_tell_runs_apart():
    paths = [pathlib.Path(path) for path in ("/runs/a/dssn", "/runs/b/dssn", "/other/b/fixmatch")]
    assert runs._labels(paths) == ["a/dssn", "b/dssn", "b/fixmatch"]
    assert runs._labels(paths[1:]) == ["dssn", "fixmatch"]


def test_miou_of_an_image_by_hand():
    label = np.array([[0, 0, 1], [1, 255, 2]], np.uint8)
    prediction = np.array([[0, 1, 1], [1, 3, 1]], np.uint8)
    # Class 0: 1 of 2; class 1: 2 of 4; class 2: 0 of 1; class 3 is predicted only where ignored.
    confusion = np.asarray(metrics.confusion_matrix(prediction, label, 5, 255))
    assert gallery.image_miou(confusion) == pytest.approx(100 * (1 / 2 + 2 / 4 + 0) / 3)
    assert gallery.image_miou(np.zeros((5, 5), int)) is None


def test_data_without_training_images(trained, tmp_path):
    """The validation images are drawn without the training data, at their own names and scores."""
    workdir = tmp_path / "run"
    shutil.copytree(trained / "dssn", workdir)
    config = json.loads((workdir / "config.json").read_text())
    root = make_root(tmp_path / "root", {"a": (0, 1), "b": (2,), "c": (255,)}, size=48)
    (root / "splits").mkdir()
    (root / "splits/val.txt").write_text("".join(f"images/{name}.png masks/{name}.png\n" for name in "abc"))
    config["data"] |= {"source": "folder", "root": str(root), "split": "", "splits": "splits"}
    (workdir / "config.json").write_text(json.dumps(config))
    (run,) = runs.read([str(workdir)])
    drawn = gallery.draw(run, images=3)
    assert "best and worst of 3 validation images" in drawn.note and "No pictures of training images" in drawn.note
    titles = {row.title.partition(":")[0] for rows in drawn.validation.values() for row in rows}
    assert titles == {"images/a.png", "images/b.png"}  # Every pixel of c is ignored.
    assert drawn.training == {}


def damage_metrics(workdir, lines):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    changed = [record | change for record, change in zip(records, lines, strict=False)] + records[len(lines) :]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))


@pytest.mark.parametrize("content", ["[]", "{}", "3", "", '{"student": 1, "teacher": [[1]]}', "\x00\x01", "not json"])
@pytest.mark.parametrize("name", ["run.json", "confusion.json", "summary.json"])
def test_parts_that_are_damaged_are_left_out(name, content, trained, tmp_path):
    shutil.copytree(trained / "supervised", tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    text = report([str(tmp_path / "run")], images=0).read_text()
    assert "loss_x" in text and "Pixel accuracy" in text


def test_entries_of_other_types_are_left_out(trained, tmp_path):
    shutil.copytree(trained / "dssn", tmp_path / "run")
    info = {"parameters": "many", "images": [1], "devices": 3, "steps": "6", "steps_per_epoch": {}}
    (tmp_path / "run/run.json").write_text(json.dumps(info))
    odd = [
        {"loss": 10**400},
        {"lr": [1, 2]},
        {"pseudo_labels": 1.0},
        {"iou_student": [1.0]},
        {"seconds": float("nan")},
        {"step": 10**30},
        {"x": 1},
    ]
    damage_metrics(tmp_path / "run", odd)
    text = report([str(tmp_path / "run")], images=0).read_text()
    assert "Pixel accuracy" in text and "not recorded" in text
    damage_metrics(tmp_path / "run", [{"miou_teacher": "?"}] * 99)  # No score of the teacher is left.
    assert "Run report" in report([str(tmp_path / "run")], images=0).read_text()


def test_names_are_shown_as_they_are(trained, tmp_path):
    """Markup of class names and of folders, bytes that are no text, and a class with the name of a metric."""
    workdir = tmp_path / os.fsdecode(b"<i>caf\xe9 %{x}")
    shutil.copytree(trained / "dssn", workdir, ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["classes"] = ["<b>bold</b>", "a & b", "mean", "Mean IoU", "ring", "cross"]
    (workdir / "config.json").write_text(json.dumps(config))
    (run,) = runs.read([str(workdir)])
    shown = ["&lt;b&gt;bold&lt;/b&gt;", "a &amp; b", "mean", "Mean IoU", "ring", "cross"]
    (bars,) = charts.class_bars([run])
    trace = charts.confusion(run, "student")["traces"][0]
    assert bars["traces"][0]["x"] == trace["x"] == trace["y"] == shown
    assert bars["traces"][0]["name"] == r"&lt;i&gt;caf\xe9 &#37;{x} student"
    text = report([str(workdir)], images=0).read_text()
    assert "<b>" not in text.partition("<script>")[0] and "<td>mean</td>" in text and "<td>Mean IoU</td>" in text


def test_files_of_the_user_stay(trained, tmp_path):
    own = tmp_path / "page.html"
    own.write_text("<!DOCTYPE html>mine")
    with pytest.raises(ConfigError, match="page.html: exists already, and holds no earlier dssn_jax report"):
        report([str(trained / "dssn")], to=str(own), images=0)
    assert own.read_text() == "<!DOCTYPE html>mine"
    for _ in range(2):  # A report may be renewed.
        report([str(trained / "dssn")], to=str(tmp_path / "new.html"), images=0)
