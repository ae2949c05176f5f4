"""A tiny data set, runs and files of weights to attack, and the results of the same commands without an attack.

`build` makes them once per session; `Place` is the folder of one attack with copies of them.
"""

import hashlib
import json
import pathlib
import pickle
import re
import shutil

import jax
import jax.export
import numpy as np
import plotly.offline
import safetensors.numpy
from PIL import Image

from dssn_jax import commands, distributed
from tests import faults

ROOT = pathlib.Path(__file__).parent.parent.parent
CLASSES = ("sky", "road", "car")
SIZE = (40, 36)  # Height and width of every image.
STEPS, STOPPED = 4, 2  # Steps of a run, and after how many the unfinished one was stopped.
LABELED, UNLABELED, VAL = ("images/0.png", "images/1.png"), ("images/2.png", "images/3.png"), ("images/4.png",)
SCORES = ("miou", "pixel_accuracy")


def make_data(root: pathlib.Path) -> None:
    """Writes images with masks, the names of the classes and the lists of the split s."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks", "splits/s"):
        (root / folder).mkdir(parents=True)
    for number in range(5):
        mask = np.repeat(np.arange(SIZE[0]) * 3 // SIZE[0], SIZE[1]).reshape(SIZE).astype(np.uint8)
        pixels = (80 * mask[..., None] + rng.integers(0, 60, (*SIZE, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"images/{number}.png")
        Image.fromarray(np.roll(mask, number, 0)).save(root / f"masks/{number}.png")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    pairs = {name: f"{name} {name.replace('images', 'masks')}\n" for name in LABELED + UNLABELED + VAL}
    (root / "splits/s/labeled.txt").write_text("".join(pairs[name] for name in LABELED))
    (root / "splits/s/unlabeled.txt").write_text("".join(f"{name}\n" for name in UNLABELED))
    (root / "splits/val.txt").write_text("".join(pairs[name] for name in VAL))


def config_flags(root: pathlib.Path, method: str = "supervised", source: str = "split=s", **keys) -> list[str]:
    """Returns the flags of the configuration of the runs, for the data in `root`."""
    arguments = f"root={root},{source},encoder=resnet10w16,method={method},crop=33,steps={STEPS}"
    values = {
        "model.decoder_channels": 4, "model.aspp_dilations": "(2,)", "data.labeled_batch": 1, "data.unlabeled_batch": 2,
        "data.threads": 2, "optimizer.lr": 0.01, "train.log_every": 1, "train.eval_every": STOPPED,
        "train.checkpoint_every": 1, "train.pictures": 0, "eval.batch": 1,
    } | {key.replace("__", "."): value for key, value in keys.items()}  # fmt: skip
    return [f"--config={ROOT}/configs/custom.py:{arguments}", *(f"--config.{key}={values[key]}" for key in values)]


def arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of the latest checkpoint."""
    return faults.final_state(workdir)


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    """Returns step and loss of the log lines, in the order in which they were written."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def differing(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> str:
    """Returns the names of the arrays that are not equal, bit for bit; "" if all are."""
    names = [name for name in {**expected, **found} if not _equal(expected.get(name), found.get(name))]
    return f"{len(names)} arrays differ, such as {sorted(names)[0]}" if names else ""


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b)


def read_maps(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the class maps that a prediction wrote, by relative path."""
    ids = folder / "class_ids"
    return {str(path.relative_to(ids)): np.asarray(Image.open(path)) for path in sorted(ids.rglob("*.png"))}


def page(path: pathlib.Path) -> str:
    """Returns a report without what depends on place and time."""
    text = path.read_text().replace(plotly.offline.get_plotlyjs(), "")
    assert "</html>" in text
    text = re.sub(r"/[^\s\"'<>]*/(?=run\b)", "/", text)
    text = re.sub(r"[^\s\"',<>=]*/root\b", "root", text)
    return re.sub(r"\b\d+:\d\d(:\d\d)?\b|\d{4}-\d\d-\d\d", "TIME", text)


def program(path: pathlib.Path) -> str:
    """Returns the program of an artifact, with its weights and without the lines of Python that made it."""
    text = jax.export.deserialize(bytearray(path.read_bytes())).mlir_module()
    text = re.sub(r" ?loc\([^()]*\)", "", "\n".join(line for line in text.splitlines() if not line.startswith("#loc")))
    return hashlib.sha256(text.encode()).hexdigest()


def scores(path: pathlib.Path) -> dict:
    """Returns the scores in the file that an evaluation wrote, without the name of the run."""
    content = json.loads(path.read_text(), parse_constant=_refuse)
    content.pop("name")
    return content


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON")


def run(*argv: str) -> None:
    """Runs a command that must succeed."""
    code = commands.run(argv)
    assert code == 0, (code, argv)


def build(folder: pathlib.Path) -> None:
    """Writes what attacks copy, and `oracle.pickle`."""
    root = folder / "root"
    make_data(root)
    run(*config_flags(root), f"--workdir={folder / 'run'}")
    run(*config_flags(root, seed=1, data__mean="(0.4,0.4,0.4)", optimizer__lr=0.02), f"--workdir={folder / 'other'}")
    _stop(root, folder / "part")
    (folder / "weights").mkdir()
    for name in ("w.safetensors", "w.pth"):
        run("--mode=convert", f"--from={folder / 'run'}", f"--to={folder / 'weights' / name}")
    results = folder / "results"
    results.mkdir()
    work = f"--workdir={folder / 'run'}"
    run("--mode=eval", *config_flags(root), work)
    run("--mode=predict", work, f"--from={root / 'images'}", f"--to={results}")
    run("--mode=export", work, f"--to={results / 'a.stablehlo'}")
    run("--mode=report", work, "--images=0", f"--to={results / 'a.html'}")
    (evaluated,) = (folder / "run").glob("eval_*.json")
    oracle = {
        "scores": scores(evaluated),
        "maps": read_maps(results),
        "export": program(results / "a.stablehlo"),
        "page": page(results / "a.html"),
        "tensors": safetensors.numpy.load_file(folder / "weights/w.safetensors"),
        "arrays": arrays(folder / "run"),
        "losses": losses(folder / "run"),
        "eval": evaluated.name,
    }
    evaluated.unlink()
    (folder / "oracle.pickle").write_bytes(pickle.dumps(oracle))


def _stop(root: pathlib.Path, workdir: pathlib.Path) -> None:
    """Trains until step STOPPED of STEPS."""
    reached = distributed.Preemption.reached
    distributed.Preemption.reached = lambda self, step: step >= STOPPED
    try:
        assert commands.run([*config_flags(root), f"--workdir={workdir}"]) != 0
    finally:
        distributed.Preemption.reached = reached


class Place:
    """The folder of one attack: `inputs` copied from the fixtures, `out` for outputs, an empty `cwd` and `home`."""

    def __init__(self, fixtures: pathlib.Path, scratch: pathlib.Path, oracle: dict):
        self.fixtures, self.scratch, self.oracle = fixtures, scratch, oracle
        self.root, self.out = scratch / "root", scratch / "out"
        for name in ("out", "cwd", "home"):
            (scratch / name).mkdir(parents=True)
            (scratch / name / "mine.txt").write_text("a file of the user\n")
        self.copy("root")

    def copy(self, name: str, to: str = "") -> pathlib.Path:
        """Copies a fixture into the place; returns its path."""
        source, target = self.fixtures / name, self.scratch / (to or name)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        return target

    def config(self, **options) -> list[str]:
        return config_flags(self.root, **options)

    # Checks of results: "" if they are those of the untouched run, else what is wrong.

    def check_scores(self, workdir: pathlib.Path) -> str:
        path = workdir / self.oracle["eval"]
        if not path.exists():
            return f"{path.name} was not written"
        found, expected = (dict(jax.tree_util.tree_leaves_with_path(s)) for s in (scores(path), self.oracle["scores"]))
        for key in {**found, **expected}:
            a, b = found.get(key), expected.get(key)
            if a != b and (not isinstance(a, float) or not isinstance(b, float) or abs(a - b) > 1e-6):
                return f"score {jax.tree_util.keystr(key)} is {a}, not {b}"
        return ""

    def check_maps(self, folder: pathlib.Path) -> str:
        return differing(self.oracle["maps"], read_maps(folder))

    def check_export(self, path: pathlib.Path) -> str:
        return "" if program(path) == self.oracle["export"] else "another artifact"

    def check_page(self, path: pathlib.Path) -> str:
        return "" if page(path) == self.oracle["page"] else "another page"

    def check_tensors(self, path: pathlib.Path) -> str:
        return differing(self.oracle["tensors"], safetensors.numpy.load_file(path))

    def check_run(self, workdir: pathlib.Path) -> str:
        """Checks that a run ended as the one that was left alone."""
        wrong = differing(self.oracle["arrays"], arrays(workdir))
        done = losses(workdir)
        if len(done) != len(dict(done)):
            return f"lines of steps twice in metrics.jsonl {wrong}"
        unequal = [step for step, loss in done if dict(self.oracle["losses"])[step] != loss]
        return wrong or (f"losses differ at steps {unequal}" if unequal else "")
