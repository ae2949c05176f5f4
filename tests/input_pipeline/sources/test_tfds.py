"""TFDS data sets, read without TensorFlow; and equal batches from files, packed files and TFDS."""

import io
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dssn_jax.prepare.pack import pack_files
from input_pipeline.errors import DataError
from input_pipeline.pipeline import train_dataset
from input_pipeline.sources.open import digest, open_source, open_sources
from tests.input_pipeline.conftest import write_list
from tests.input_pipeline.test_decode import encoded, exif

tfds = pytest.importorskip("tensorflow_datasets")
TRAIN, TEST = 200, 3  # Grain takes ten times as long to shuffle ten records as to shuffle hundreds.


def make_files(count):
    """Yields (image, mask) as bytes: images of several sizes and modes, masks of the ids 1, 2 and 3."""
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = rng.integers(14, 40, 2)
        image = Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8))
        rotated = number % 4 == 2
        kind = [
            lambda image: encoded(image, "JPEG"),
            lambda image: encoded(image.convert("P")),
            lambda image: encoded(image, "JPEG", exif=exif(6)),
            lambda image: encoded(image.convert("L"), "JPEG"),
        ][number % 4]
        mask = rng.integers(1, 4, size=(width, height) if rotated else (height, width), dtype=np.uint8)
        yield kind(image).content, encoded(Image.fromarray(mask)).content


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Returns a folder with the TFDS data set "pets_like", the files of `make_files` in order."""

    class PetsLike(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
                "species": tfds.features.ClassLabel(names=["cat", "dog"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples(0, TRAIN), "test": self._generate_examples(TRAIN, TRAIN + TEST)}

        def _generate_examples(self, start, stop):
            for number, (image, mask) in list(enumerate(make_files(stop)))[start:]:
                yield number, {"image": io.BytesIO(image), "segmentation_mask": io.BytesIO(mask), "species": 0}

    folder = tmp_path_factory.mktemp("tfds")
    PetsLike(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def tfds_config(data_dir, config, tmp_path):
    (tmp_path / "map.txt").write_text("1 a\n2 b\n3 ignore\n")
    config.data.update({"source": "tfds", "label_map": str(tmp_path / "map.txt"), "classes": ("a", "b")})
    config.data.tfds.update({"name": "pets_like", "data_dir": str(data_dir), "labeled": "train[:5]"})
    config.data.tfds.update({"unlabeled": "train", "val": "test"})
    return config


def test_records(tfds_config):
    sources = pickle.loads(pickle.dumps(open_sources(tfds_config)))
    assert [len(source) for source in sources] == [5, TRAIN, TEST]
    files = list(make_files(TRAIN + TEST))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(sources.val.__getitem__, [*range(TEST)] * 10))
    for number, record in enumerate(read):
        index = number % TEST
        mask = np.asarray(Image.open(io.BytesIO(files[TRAIN + index][1])))
        np.testing.assert_array_equal(record["label"], np.array([0, 0, 1, 255])[mask])
        assert record["image"].shape[:2] == sources.val.size(index) == mask.shape
    assert set(sources.unlabeled[0]) == {"image"}
    assert "tensorflow" not in sys.modules


def test_open_source(tfds_config):
    expected = digest(open_sources(tfds_config).val)
    tfds_config.data.tfds.update({"labeled": "absent", "unlabeled": "absent"})
    assert digest(open_source(tfds_config, "val")) == expected


def test_names_identify_records_in_overlapping_splits(tfds_config):
    tfds_config.data.tfds.labeled = "train[4:6]+train[10:11]"
    sources = open_sources(tfds_config)
    names = [sources.unlabeled.name(i) for i in range(TRAIN)]
    assert len(set(names)) == TRAIN
    for index, same in enumerate((4, 5, 10)):
        assert sources.labeled.name(index) == names[same]
        np.testing.assert_array_equal(sources.labeled[index]["image"], sources.unlabeled[same]["image"])
    with pytest.raises(IndexError):
        sources.labeled.name(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "pets_lik"}, r"no TFDS data set 'pets_lik' in .*; did you mean 'pets_like'\?.*not downloaded"),
        ({"name": "pets_like:7.0.0"}, r"no TFDS data set 'pets_like:7\.0\.0'"),
        (
            {"data_dir": "/absent"},
            r"no TFDS data set 'pets_like' in /absent .*`tfds build pets_like --file_format=array",
        ),
        ({"name": ""}, r"config\.data\.tfds\.name is not set"),
        ({"label": "mask"}, r"pets_like/1\.2\.0: no image feature 'mask'; did you mean 'segmentation_mask'\?"),
        ({"image": "species"}, r"no image feature 'species'; known: image, segmentation_mask"),
        ({"val": "tset"}, r"split 'tset': .*did you mean 'test'\?"),
        ({"val": "train[:"}, r"split 'train\[:'"),
        ({"val": "train[:0]"}, r"split 'train\[:0\]'"),
    ],
)
def test_errors_name_the_key(tfds_config, options, message):
    tfds_config.data.tfds.update(options)
    with pytest.raises(DataError, match=message):
        open_sources(tfds_config)


def test_formats_without_random_access_are_refused(tfds_config, data_dir, tmp_path):
    copy = tmp_path / "pets_like/1.2.0"
    copy.mkdir(parents=True)
    for path in (data_dir / "pets_like/1.2.0").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    info = json.loads((copy / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (copy / "dataset_info.json").write_text(json.dumps(info))
    tfds_config.data.tfds.data_dir = str(tmp_path)
    with pytest.raises(DataError, match=r"format tfrecord, which has no random access; make it with: tfds build"):
        open_sources(tfds_config)


def test_without_tfds_the_error_names_the_package(tfds_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.core", None)
    with pytest.raises(DataError, match=r"needs: pip install tensorflow-datasets importlib_resources"):
        open_sources(tfds_config)


def test_values_missing_from_the_map_are_named(tfds_config, tmp_path):
    (tmp_path / "map.txt").write_text("1 a\n2 b\n")
    with pytest.raises(DataError, match=r"segmentation_mask of pets_like/1\.2\.0/.*/0: mask values 3 found"):
        open_sources(tfds_config).labeled[0]


def test_all_sources_give_the_same_batches(tfds_config, tmp_path):
    """The first 100 batches of the same files, bit for bit, with all random transforms."""
    root = tmp_path / "root"
    for name in ("images", "masks", "splits/small"):
        (root / name).mkdir(parents=True)
    for number, (image, mask) in enumerate(make_files(TRAIN + TEST)):
        (root / f"images/{number}.png").write_bytes(image)
        (root / f"masks/{number}.png").write_bytes(mask)
    write_list(root / "splits/small/labeled.txt", range(5))
    write_list(root / "splits/small/unlabeled.txt", range(TRAIN))
    write_list(root / "splits/val.txt", range(TRAIN, TRAIN + TEST))
    tfds_config.data.update({"scale": (0.5, 2.0), "flip": 0.5, "root": str(root)})
    tfds_config.data.update({"unlabeled_batch": 2, "threads": 2})
    tfds_config.views.mix_partner = "other"
    read = {}
    for source in ("folder", "array_record", "tfds"):
        tfds_config.data.source = source
        if source == "array_record":
            tfds_config.data.source = "folder"
            pack_files(tfds_config, str(tmp_path / "packed"), 3000)
            tfds_config.data.update({"source": source, "root": str(tmp_path / "packed")})
        sources = open_sources(tfds_config)
        dataset = train_dataset(sources, tfds_config)
        read[source] = (
            [dataset[step]._asdict() for step in range(100)],
            [sources.val[i] for i in range(TEST)],
            digest(sources.unlabeled),
        )
    assert read["folder"][2] == read["array_record"][2]
    for source in ("array_record", "tfds"):
        for dicts, expected in zip(read[source][:2], read["folder"][:2], strict=True):
            for arrays, others in zip(dicts, expected, strict=True):
                assert set(arrays) == set(others)
                for key, array in arrays.items():
                    np.testing.assert_array_equal(array, others[key])
    first, last = read["folder"][0][0], read["folder"][0][99]
    assert not np.array_equal(first["image_x"], last["image_x"]) and set(np.unique(first["label_x"])) == {0, 1, 255}
