"""Training batches as a pure function of (config, lists, step).

Any process or thread can make any batch, so batches do not depend on the number of threads, workers and hosts, and a
run resumes from its step number. Each host makes its own rows of the global batch.
"""

import functools
import multiprocessing.connection
import multiprocessing.resource_tracker
import operator
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from input_pipeline.batch import Batch, labeled_rows
from input_pipeline.class_statistics import RareClasses, rare_classes
from input_pipeline.errors import DataError, UserError
from input_pipeline.sources.open import Source, Sources
from input_pipeline.transforms.cutmix import cutmix_box
from input_pipeline.transforms.geometry import rare_view, weak_view

MIX_PARTNERS = ("same", "other", "reversed", "labeled")

Record = dict[str, np.ndarray]  # Some fields of a `Batch`, for a single image or stacked.


class WorkerError(UserError):
    """A worker process that makes batches ended, by a signal or for lack of memory."""


class RunLength(NamedTuple):
    """The length of a training run."""

    steps: int
    steps_per_epoch: int


def run_length(sources: Sources, config: ConfigDict) -> RunLength:
    """Returns the number of steps of the run and of an epoch; raises DataError as `steps_per_epoch` does."""
    per_epoch = steps_per_epoch(sources, config)
    return RunLength(config.train.steps or config.train.epochs * per_epoch, per_epoch)


def steps_per_epoch(sources: Sources, config: ConfigDict) -> int:
    """Returns the number of full unlabeled batches in one pass over the unlabeled list.

    Raises:
      DataError: the list is shorter than one batch.
    """
    images, batch = len(sources.unlabeled), config.data.unlabeled_batch
    if images < batch:
        raise DataError(f"{images} unlabeled images are fewer than one batch of {batch} (config.data.unlabeled_batch)")
    return images // batch


def train_dataset(
    sources: Sources, config: ConfigDict, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """Returns the endless sequence of training batches, by step.

    An epoch is one pass over the unlabeled list, in a new order, without the images that fill no batch. Within it each
    labeled image occurs floor or ceil of (steps * labeled batch / labeled images) times, in a new order; or, with
    `data.labeled_sampling=rare`, labeled images are drawn with replacement.

    Args:
      sources: from `open_sources`.
      config: the whole configuration.
      process_index: index of this host.
      process_count: number of hosts; host i of n makes the rows [i b / n, (i + 1) b / n) of a global batch of b.

    Returns:
      A dataset of `Batch` with the rows of this host. It has unlabeled images if the method has views of them, boxes if
      it has strong views, and then partners, with labels if `views.mix_partner` is labeled, none if it is reversed.

    Raises:
      DataError: lists or batch sizes that do not fit, or bad labeled masks, if their classes are counted. Later, when a
        batch is read: a file that cannot be used.
    """
    config = FrozenConfigDict(config)  # Later changes by the caller must not reach a running pipeline.
    steps = steps_per_epoch(sources, config)
    # Grain adds the epoch to the seed of a shuffle; consecutive seeds would give two streams the same orders.
    seeds = np.random.SeedSequence(config.seed).generate_state(4).tolist()

    def batches(records: grain.MapDataset, key: str, size: int) -> _Batches:
        return _Batches(records, size, _rows(key, size, process_index, process_count), config.data.threads)

    size = labeled_rows(config)
    labeled = _Labeled(sources.labeled, config, rare_classes(sources.labeled, config))
    records = _labeled_records(labeled, steps * size, *seeds[:2])
    streams = [batches(records, "labeled_batch", size)]
    if config.method.strong_views or config.method.feature_views:
        records = _unlabeled_records(sources.unlabeled, labeled, config, *seeds[2:])
        streams.append(batches(records, "unlabeled_batch", config.data.unlabeled_batch))
    return grain.experimental.ZipMapDataset(streams).map(_to_batch).repeat()


def _rows(key: str, batch: int, process_index: int, process_count: int) -> slice:
    if batch < 1 or batch % process_count:
        raise DataError(
            f"config.data.{key}: {batch} images per step; expected a multiple of the {process_count} processes"
        )
    share = batch // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _to_batch(streams: tuple[Record, ...]) -> Batch:
    return Batch(**functools.reduce(operator.or_, streams))


class _Labeled(NamedTuple):
    """The labeled images, and how views of them are drawn."""

    source: Source
    config: FrozenConfigDict
    rare: RareClasses | None

    def view(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws a weak view: uint8 [c, c, 3], and its class ids, uint8 [c, c].

        It is of image `index`, or, with `data.labeled_sampling=rare`, of an image that is drawn with its crop.
        """
        data = self.config.data
        if data.labeled_sampling == "rare":
            index, wanted = self.rare.draw_image(rng)
            record = self.source[index]
            return rare_view(record["image"], record["label"], wanted, data, rng)[:2]
        record = self.source[index]
        return weak_view(record["image"], record["label"], data, rng)[:2]

    def record(self, index: int, rng: np.random.Generator) -> Record:
        """Returns the fields of a labeled image."""
        image, label = self.view(index, rng)
        return {"image_x": image, "label_x": label}

    def partner(self, rng: np.random.Generator) -> Record:
        """Returns the fields of a CutMix partner but for the boxes."""
        image, label = self.view(int(rng.integers(len(self.source))), rng)
        record = {"image_m": image, "label_m": label}
        if self.config.views.paste_classes:
            record["classes"] = np.stack([self._classes(label, rng) for _ in range(self.config.method.strong_views)])
        return record

    def _classes(self, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws the classes of `label` that are pasted as a whole, bool [classes] (docs/method.md, Eq. 22)."""
        present = np.bincount(label.ravel(), minlength=256) > 0
        present[self.config.data.ignore] = False
        drawn = np.zeros(len(self.config.data.classes), bool)
        drawn[self.rare.draw(present[: len(drawn)], self.config.views.paste_classes, rng)] = True
        return drawn


def _labeled_records(labeled: _Labeled, per_epoch: int, order_seed: int, view_seed: int) -> grain.MapDataset:
    order = grain.MapDataset.range(per_epoch).shuffle(seed=order_seed)
    # Successive epochs take successive stretches of the endlessly repeated list, so that the images that occur once
    # more than the others change.
    order = order.map_with_index(functools.partial(_tile, per_epoch, len(labeled.source)))
    return order.random_map(labeled.record, seed=view_seed)


def _tile(per_epoch: int, images: int, position: int, drawn: int) -> int:
    return (position // per_epoch * per_epoch + drawn) % images


def _unlabeled_records(
    source: Source, labeled: _Labeled, config: FrozenConfigDict, order_seed: int, view_seed: int
) -> grain.MapDataset:
    order = grain.MapDataset.range(len(source)).shuffle(seed=order_seed)
    pairs = order.map_with_index(functools.partial(_pair, order, _partner_distance(len(source), config)))
    return pairs.random_map(functools.partial(_unlabeled_record, source, labeled, config), seed=view_seed)


def _partner_distance(images: int, config: FrozenConfigDict) -> int:
    """Returns the cyclic distance from an image to its CutMix partner in the order of the epoch.

    0: to itself, and where a batch needs no unlabeled partners.
    """
    partner = config.views.mix_partner
    if partner not in MIX_PARTNERS:
        raise DataError(f"config.views.mix_partner is {partner!r}; known: {', '.join(MIX_PARTNERS)}")
    if partner != "other":
        return 0
    if images < 2:
        raise DataError("config.views.mix_partner is 'other', which needs at least 2 unlabeled images; found 1")
    # The order is random, so any distance pairs at random; half the list keeps partners out of the same batch.
    return images // 2


def _pair(order: grain.MapDataset, distance: int, position: int, index: int) -> tuple[int, int]:
    """Returns the image at `position` of the endless `order` and its partner from the same epoch."""
    epoch, place = divmod(position, len(order))
    return index, order[epoch * len(order) + (place + distance) % len(order)]


def _unlabeled_record(
    source: Source, labeled: _Labeled, config: FrozenConfigDict, pair: tuple[int, int], rng: np.random.Generator
) -> Record:
    index, partner = pair
    image = source[index]["image"]
    record = {}
    record["image_u"], _, record["valid_u"] = weak_view(image, None, config.data, rng)
    if config.method.strong_views:
        if config.views.mix_partner == "labeled":
            record |= labeled.partner(rng)
        elif config.views.mix_partner != "reversed":
            other = image if partner == index else source[partner]["image"]
            record["image_m"], _, record["valid_m"] = weak_view(other, None, config.data, rng)
        boxes = [cutmix_box(config.data.crop, config.views, rng) for _ in range(config.method.strong_views)]
        record["boxes"] = np.stack(boxes)
    return record


class _Batches(grain.MapDataset):
    """The given rows of the consecutive full batches of a dataset, epoch by epoch.

    A pool of threads makes the records of a batch in parallel. Each of Grain's own threads makes an element, here a
    whole batch, so that using all cores would take as many batches in memory as there are threads.
    """

    def __init__(self, records: grain.MapDataset, batch: int, rows: slice, threads: int):
        super().__init__(records)
        self._batch, self._rows, self._threads = batch, rows, threads

    def __len__(self) -> int:
        return len(self._parent) // self._batch

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, step = divmod(index, len(self))
        first = epoch * len(self._parent) + step * self._batch
        positions = range(first, first + self._batch)[self._rows]
        records = list(_pool(self._threads).map(self._parent.__getitem__, positions))
        return {key: np.stack([record[key] for record in records]) for key in records[0]}


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Returns the threads of this process that make records; not in a dataset, because datasets are pickled."""
    return ThreadPoolExecutor(threads, thread_name_prefix="records")


class TrainIterator(grain.DatasetIterator):
    """Iterates over the batches of `train_dataset`; its state is the number of the next step, {"step": int}.

    A state is valid for any number of threads, workers and processes. `close` ends the workers, which otherwise end
    with the iterator.
    """

    def __init__(self, dataset: grain.MapDataset, workers: int, buffer: int):
        super().__init__()
        self._dataset, self._workers, self._buffer = dataset, workers, buffer
        self._step = 0
        self._batches: grain.DatasetIterator | None = None
        if workers:
            _start_resource_tracker()

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("the iterator is closed")
        try:
            self.start_prefetch()
            batch = next(self._batches)
        except BaseException as error:
            self._stop()  # Grain's iterators are unusable after an error; the next call starts this step again.
            if ended := re.search("Worker process was terminated .* exit code (-?[0-9]+)", str(error)):
                raise self._worker_error(ended[1]) from None
            raise
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns {"step": number of the next batch}."""
        return {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state of this iterator, or of another one over an equal dataset."""
        self._stop()
        self._step = int(state["step"])

    def start_prefetch(self) -> None:
        """Starts making batches, without waiting for the first."""
        if self._batches is None:
            options = grain.ReadOptions(num_threads=self._buffer, prefetch_buffer_size=self._buffer)
            batches = self._dataset[self._step :].to_iter_dataset(options)
            if self._workers:
                # Grain assigns batches to workers in turn, which keeps their order.
                options = grain.MultiprocessingOptions(num_workers=self._workers)
                batches = batches.mp_prefetch(options, worker_init_fn=_end_with_parent)
            self._batches = iter(batches)
            self._batches.start_prefetch()

    def close(self) -> None:
        """Ends threads and workers."""
        self._closed = True
        self._stop()

    def _worker_error(self, exit_code: str) -> WorkerError:
        return WorkerError(
            f"a worker process that makes batches ended with exit code {exit_code} (-9: killed, often for lack of "
            f"memory) before batch {self._step}; config.data.workers is {self._workers}, config.data.buffer "
            f"{self._buffer}: lower values take less memory"
        )

    def _stop(self) -> None:
        batches, self._batches = self._batches, None
        if batches is not None:
            batches.close()


def _end_with_parent(worker: int, workers: int) -> None:
    """Ends this worker process when its parent has ended, even by SIGKILL, which lets the parent close nothing."""

    def watch() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def _start_resource_tracker() -> None:
    """Starts Python's process that frees the shared memory of killed processes, without its warning that it did.

    Python would start it with the first worker, and let that thread, and so the workers, receive SIGINT and SIGTERM
    even if they are blocked there.
    """
    ignored, before = "ignore:resource_tracker:UserWarning", os.environ.get("PYTHONWARNINGS", "")
    if ignored not in before:
        os.environ["PYTHONWARNINGS"] = f"{before},{ignored}" if before else ignored
    multiprocessing.resource_tracker.ensure_running()


def train_iterator(dataset: grain.MapDataset, config: ConfigDict) -> TrainIterator:
    """Returns an iterator over batches that threads or worker processes make ahead.

    Args:
      dataset: from `train_dataset`.
      config: the whole configuration, of which `config.data.{workers,buffer}`. With workers > 0 absl's flags must be
        parsed, as `absl.app.run` does.

    Returns:
      An iterator that starts at step 0; `set_state` moves it. Its `next` raises the errors of threads and workers, such
      as `DataError`. `grain.checkpoint` can save and restore it.
    """
    return TrainIterator(dataset, config.data.workers, config.data.buffer)
