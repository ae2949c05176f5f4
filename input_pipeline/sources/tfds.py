"""Sources of TensorFlow Datasets on disk, read without TensorFlow."""

import functools
import os

from input_pipeline.decode import Encoded
from input_pipeline.errors import DataError, did_you_mean
from input_pipeline.labels import Labels
from input_pipeline.sources.encoded import EncodedSource


class TfdsSource(EncodedSource):
    """A TFDS split, such as "train[:10%]"."""

    def __init__(self, dataset, split: str, image: str, label: str, labels: Labels | None):
        """Opens no shard.

        Args:
          dataset: builder from `open_dataset`.
          split: name of the split, in the syntax of TFDS.
          image: key of the image feature.
          label: key of the mask feature.
          labels: see `EncodedSource`.

        Raises:
          DataError: no such split, an empty one, or a format without random access.
        """
        import tensorflow_datasets as tfds

        # For all image features: TFDS would decode those left out.
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
        self._shards = [(os.path.basename(shard.filename), shard.skip, shard.take) for shard in instructions]

    def name(self, index: int) -> str:
        """Returns the data set, the shard and the position in it, which are equal in overlapping splits."""
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
        except Exception as error:  # The C++ libraries below raise several types.
            raise DataError(f"{self.name(index)}: damaged TFDS record: {error}") from None


def open_dataset(name: str, data_dir: str):
    """Opens a TFDS data set on disk; downloads nothing.

    Args:
      name: name, such as "oxford_iiit_pet" or "cityscapes/semantic_segmentation:1.0.0".
      data_dir: folder of the data sets; "": the default of TFDS, $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Returns:
      A TFDS builder.

    Raises:
      DataError: TFDS is not installed, or there is no such data set.
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
        known = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        known = [entry for entry in known if entry != "downloads" and os.path.isdir(os.path.join(folder, entry))]
        base = name.split("/")[0].split(":")[0]
        raise DataError(
            f"no TFDS data set {name!r} in {folder} (config.data.tfds.name and data_dir){_hint(base, known)}. It is "
            f"not downloaded; `tfds build {name} --file_format=array_record --data_dir={folder}` makes it, and may "
            "need TensorFlow"
        ) from None


def _hint(name: str, known) -> str:
    known = list(known)
    # `containing`: "mask" should suggest "segmentation_mask".
    return f"{did_you_mean(name, known, cutoff=0.4, containing=True) or ';'} known: {', '.join(known) or 'none'}"
