"""Sources of TensorFlow Datasets, read without TensorFlow: encoded images and masks of a data set on disk."""

import functools
import os

from input_pipeline.decode import Encoded
from input_pipeline.errors import DataError, did_you_mean
from input_pipeline.labels import Labels
from input_pipeline.sources.encoded import EncodedSource


class TfdsSource(EncodedSource):
    """A split of a data set, such as "train[:10%]"."""

    def __init__(self, dataset, split: str, image: str, label: str, labels: Labels | None):
        """Opens no shard.

        Args:
          dataset: what `open_dataset` returned.
          split: in the words of TFDS.
          image: key of the feature that is the image.
          label: key of the feature that is the mask.
          labels: see `EncodedSource`.

        Raises:
          DataError: no such split, an empty one, or a format without random access.
        """
        import tensorflow_datasets as tfds

        # All images, or those that nobody asked for would be decoded.
        features = sorted(dataset.info.features.items())
        images = [key for key, feature in features if isinstance(feature, tfds.features.Image)]
        decoders = {key: tfds.decode.SkipDecoding() for key in images}
        for key in (image, label):
            if key not in images:
                raise DataError(f"TFDS data set {dataset.info.full_name}: no image feature {key!r}{_hint(key, images)}")
        try:
            self._records = dataset.as_data_source(split, decoders=decoders)
            instructions = dataset.info.splits[split].file_instructions
        except NotImplementedError:
            raise DataError(
                f"{dataset.data_dir}: TFDS data set of the format {dataset.info.file_format.value}, which has no "
                f"random access; make it with: tfds build {dataset.name} --file_format=array_record"
            ) from None
        except (ValueError, KeyError) as error:
            known = dataset.info.splits
            raise DataError(
                f"TFDS data set {dataset.info.full_name}: split {split!r}: {error}{_hint(split, known)}"
            ) from None
        super().__init__(len(self._records), f"{dataset.info.full_name} {split}", labels)
        if not len(self):
            raise DataError(f"TFDS data set {dataset.info.full_name}: split {split!r} is empty")
        self._image, self._label, self._prefix = image, label, dataset.info.full_name
        self._shards = [(os.path.basename(each.filename), each.skip, each.take) for each in instructions]

    def name(self, index: int) -> str:
        """Returns the data set, the shard and the record's place in it, which are alike in overlapping splits."""
        for shard, skip, take in self._shards:
            if index < take:
                return f"{self._prefix}/{shard}/{skip + index}"
            index -= take
        raise IndexError(index)

    def files(self, index: int) -> tuple[Encoded, Encoded | None]:
        """See `EncodedSource`."""
        where = self.name(index)

        def file(key: str) -> Encoded:
            return Encoded(functools.partial(self._read, index, key), f"{key} of {where}")

        return file(self._image), None if self.labels is None else file(self._label)

    def _read(self, index: int, key: str) -> bytes:
        try:
            return self._records[index][key]
        except Exception as error:  # The libraries below raise what their C++ code meets as several types.
            raise DataError(f"{self.name(index)}: damaged TFDS record: {error}") from None


def open_dataset(name: str, data_dir: str):
    """Opens a TFDS data set that is on disk; downloads nothing.

    Args:
      name: such as "oxford_iiit_pet" or "cityscapes/semantic_segmentation:1.0.0".
      data_dir: folder of TFDS data sets; "": TFDS's own, $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Returns:
      A builder of TFDS.

    Raises:
      DataError: TFDS is not installed, or no such data set is there.
    """
    try:
        from tensorflow_datasets.core import constants, read_only_builder
    except ImportError as error:
        raise DataError(
            f"config.data.source is 'tfds', which needs: pip install tensorflow-datasets importlib_resources ({error})"
        ) from None
    if not name:
        raise DataError("config.data.tfds.name is not set: a data set such as oxford_iiit_pet")
    folder = os.path.expanduser(data_dir or constants.DATA_DIR)
    try:
        return read_only_builder.builder_from_files(name, data_dir=folder)
    except ValueError:
        there = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        there = [each for each in there if each != "downloads" and os.path.isdir(os.path.join(folder, each))]
        base = name.split("/")[0].split(":")[0]
        raise DataError(
            f"no TFDS data set {name!r} in {folder} (config.data.tfds.name and data_dir){_hint(base, there)}. It is "
            f"not downloaded from here; `tfds build {name} --file_format=array_record --data_dir={folder}` makes it, "
            "and may need TensorFlow"
        ) from None


def _hint(found: str, known) -> str:
    known = list(known)
    # "mask" is nearer to "segmentation_mask" than it looks.
    return f"{did_you_mean(found, known, cutoff=0.4, part=True) or ';'} known: {', '.join(known) or 'none'}"
