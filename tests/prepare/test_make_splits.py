import os

import numpy as np
import pytest

from configs import custom, defaults
from dssn_jax.prepare.make_splits import make_splits, stratified
from input_pipeline.errors import DataError
from input_pipeline.sources.open import open_sources
from input_pipeline.split_lists import Entry, read_list
from tests.input_pipeline.own_images import make_root


@pytest.fixture
def root(tmp_path):
    """Returns a root of 80 images of class a, every second with b, 3 with the rare c; and 5 without masks."""
    masks = {f"{n:02}": (0, 1) if n % 2 else (0,) for n in range(80)}
    masks |= dict.fromkeys(("07", "08", "60"), (0, 2))
    return make_root(tmp_path / "my images", masks, unlabeled=[f"u{n}" for n in range(5)], size=4)


def _lists(root, name):
    return [read_list(str(root / "splits" / path), False) for path in (f"{name}/labeled.txt", f"{name}/unlabeled.txt")]


@pytest.mark.parametrize("stratify", [True, False])
def test_subsets_are_nested_and_complete(root, stratify):
    data = custom.get_config(f"root={root}").data
    summaries = make_splits(data, ["1/8", "1_4", "30", "full"], stratify=stratify)
    # 80 labeled, a fifth of them validates; eighth and quarter of the other 64.
    assert [(m.name, m.labeled) for m in summaries] == [("1_8", 8), ("1_4", 16), ("30", 30), ("full", 64)]
    assert {m.val for m in summaries} == {16}
    val = set(read_list(str(root / "splits/val.txt"), True))
    before = set()
    for subset in summaries:
        labeled, unlabeled = _lists(root, subset.name)
        assert before < set(labeled)
        before = set(labeled)
        assert len(labeled) == subset.labeled and len(unlabeled) == subset.unlabeled == 64 - len(labeled) + 5
        images = [entry.image for entry in (*labeled, *unlabeled, *val)]
        assert len(set(images)) == len(images) == 85
    # A subset that is made later is nested with those that exist.
    make_splits(data, ["12"], stratify=stratify)
    assert set(_lists(root, "1_8")[0]) < set(_lists(root, "12")[0]) < set(_lists(root, "1_4")[0])


def test_training_reads_the_lists(root):
    make_splits(custom.get_config(f"root={root}").data, ["1_8"])
    sources = open_sources(custom.get_config(f"root={root},split=1_8"))
    assert [len(source) for source in sources] == [8, 61, 16]
    assert sources.labeled[0]["label"].shape == (4, 4)


def test_seeds(root):
    data = custom.get_config(f"root={root}").data
    for seed, folder in ((0, "first"), (0, "again"), (1, "other")):
        make_splits(data, ["1_8"], seed=seed, to=folder)
    first, again, other = (
        {name: (root / folder / name).read_text() for name in ("val.txt", "1_8/labeled.txt", "1_8/unlabeled.txt")}
        for folder in ("first", "again", "other")
    )
    assert first == again
    assert first["val.txt"] == other["val.txt"] and first["1_8/labeled.txt"] != other["1_8/labeled.txt"]


def test_order_is_the_same_on_all_machines():
    """Digests of names and integers decide, so this order, recorded on one machine, must hold on every other."""
    entries = [Entry(f"{n}.jpg", f"{n}.png") for n in range(8)]
    present = {entry: np.array([True, n % 2 == 0, n == 5]) for n, entry in enumerate(entries)}
    assert "".join(entry.image[0] for entry in stratified(entries, present, "0")) == "50674321"


def test_rare_classes_come_first(root):
    """Plain subsets of 4 of 64 images would miss the rare class, which 3 of 80 have, in 4 of 5 seeds."""
    data = custom.get_config(f"root={root}").data
    for seed in range(10):
        summaries = make_splits(data, ["4"], seed=seed, to=f"seed{seed}")
        assert summaries[0].absent == ()
    plain = [make_splits(data, ["4"], seed=seed, stratify=False, to=f"plain{seed}") for seed in range(10)]
    chosen = [read_list(str(root / f"plain{seed}/4/labeled.txt"), True) for seed in range(10)]
    rare = {f"images/{name}.png" for name in ("07", "08", "60")}
    assert sum(bool(rare & {entry.image for entry in entries}) for entries in chosen) < 8
    assert plain[0][0].absent == ()  # Not computed.


def test_prefixes_have_their_share():
    """In every prefix of the order each class has its share of the images, to within two images or so."""
    rng = np.random.default_rng(0)
    entries = [Entry(f"{n}.jpg", f"{n}.png") for n in range(300)]
    rates = np.array([1.0, 0.5, 0.2, 0.05, 0.01])
    has = rng.random((300, 5)) < rates
    order = stratified(entries, dict(zip(entries, has, strict=True)), "0")
    assert sorted(order) == sorted(entries)
    rows = has[[entries.index(entry) for entry in order]]
    for size in (20, 40, 75, 150):
        counts, expected = rows[:size].sum(0), has.sum(0) * size / 300
        assert (counts >= np.minimum(has.sum(0), 1)).all()
        assert (np.abs(counts - expected) <= 0.15 * expected + 3).all(), (size, counts, expected)


def test_validation_leaves_single_images_to_training(tmp_path):
    """A class whose only image is for validation cannot be learned."""
    masks = {f"{n}": (0,) for n in range(9)} | {"only": (1,)}
    root = make_root(tmp_path, masks)
    for fraction in ("0.1", "0.3", "0.5"):
        make_splits(custom.get_config(f"root={root},labeled=images,val={fraction}").data, ["full"], to=fraction)
        val = read_list(str(root / fraction / "val.txt"), True)
        assert len(val) == round(10 * float(fraction)) and "images/only.png" not in {entry.image for entry in val}


def test_nothing_is_overwritten(root):
    data = custom.get_config(f"root={root}").data
    make_splits(data, ["1_8"])
    before = {path: path.read_bytes() for path in sorted((root / "splits").rglob("*.txt"))}
    with pytest.raises(DataError, match=r"splits/1_8/labeled\.txt.*exists already.*nothing was written"):
        make_splits(data, ["1_4", "1_8"], seed=1)
    data.folders.val = "0.5"
    with pytest.raises(DataError, match=r"splits/val\.txt.*exists already"):
        make_splits(data, ["1_4"])
    assert {path: path.read_bytes() for path in sorted((root / "splits").rglob("*.txt"))} == before
    assert sorted(os.listdir(root)) == ["classes.txt", "images", "masks", "splits", "unlabeled"]


@pytest.mark.parametrize("subset", ["0", "1_0", "0.5", "1_8_2", "some", "", "65"])
def test_bad_subsets(root, subset):
    with pytest.raises(DataError, match=f"subset '{subset}'"):
        make_splits(custom.get_config(f"root={root}").data, [subset], stratify=False)
    assert not (root / "splits").exists()


def test_from_lists_of_pairs(root):
    (root / "pairs.txt").write_text("".join(f"images/{n:02}.png masks/{n:02}.png\n" for n in range(20)))
    (root / "test.txt").write_text("images/30.png masks/30.png\n")
    data = custom.get_config(f"root={root},labeled=pairs.txt,val=test.txt").data
    (summary,) = make_splits(data, ["1_2"])
    assert (summary.labeled, summary.unlabeled, summary.val) == (10, 15, 1)


def test_lists_of_the_original_are_left_alone(tmp_path):
    """`data.splits` accepts the lists of UniMatch: val.txt beside the splits, masks in unlabeled.txt."""
    root = make_root(tmp_path / "voc", {f"{n}": (n % 3,) for n in range(6)})
    splits = tmp_path / "splits/pascal"
    (splits / "92").mkdir(parents=True)
    lines = [f"images/{n}.png masks/{n}.png" for n in range(6)]
    for name, chosen in (("92/labeled.txt", lines[:2]), ("92/unlabeled.txt", lines[2:4]), ("val.txt", lines[4:])):
        (splits / name).write_text("\n".join(chosen))
    before = {path: path.read_bytes() for path in splits.rglob("*.txt")}
    config = defaults.get_config()
    config.data.update({"root": str(root), "splits": str(splits), "split": "92", "classes": ("a", "b", "c")})
    assert [len(source) for source in open_sources(config)] == [2, 2, 2]
    (summary,) = make_splits(config.data, ["1"], to=str(tmp_path / "mine"))
    assert (summary.labeled, summary.unlabeled, summary.val) == (1, 3, 2)
    assert {path: path.read_bytes() for path in splits.rglob("*.txt")} == before


def test_other_files_beside_the_lists_stay(root):
    (root / "splits.part").mkdir()
    (root / "splits.part/notes.txt").write_text("mine")
    make_splits(custom.get_config(f"root={root}").data, ["1_8"])
    assert (root / "splits.part/notes.txt").read_text() == "mine"
    assert {path.name for path in (root / "splits").iterdir()} == {"1_8", "val.txt"}
