"""Batches for evaluation and prediction: images of any size, padded to a few sizes so that few programs compile."""

import collections
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from input_pipeline.errors import DataError
from input_pipeline.sources.open import Source

_MOST_BUCKETS = 64  # Before joining; similar sizes share a bucket from the start if there are more.

Size = tuple[int, int]  # Height and width, pixels.


class EvalBatch(NamedTuple):
    """Images padded at the right and at the bottom to one size. Rows without an image have size (0, 0).

    Attributes:
      images: uint8 [rows, H, W, 3], padding 0.
      labels: uint8 [rows, H, W]; ignored on the padding, and throughout if the source has no labels.
      sizes: int32 [rows, 2], height and width of each image.
      indices: records of the source, in the first rows.
    """

    images: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    indices: tuple[int, ...]


class EvalOptions(NamedTuple):
    """How `eval_batches` groups and pads images.

    Attributes:
      batch: rows per batch, over all processes; the last batch of a size may hold fewer images.
      ignore: label of the padding.
      buckets: greatest number of padded sizes.
      crop: if not 0, the central `crop` x `crop` pixels of each image, or all of a side that is shorter.
      size_multiple: padded heights and widths are multiples of this.
      threads: number of threads that decode.
      process_index: index of this host.
      process_count: number of hosts; host i of n gets the rows [i b / n, (i + 1) b / n) of a batch of b.
    """

    batch: int
    ignore: int = 255
    buckets: int = 4
    crop: int = 0
    size_multiple: int = 1
    threads: int = 16
    process_index: int = 0
    process_count: int = 1


class _Bucket(NamedTuple):
    height: int
    width: int
    images: int
    members: tuple[Size, ...]

    def cost(self, batch: int) -> int:
        """Returns the pixels per channel of the batches that its images fill, padding included."""
        return math.ceil(self.images / batch) * self.height * self.width

    def join(self, other: "_Bucket") -> "_Bucket":
        height, width = max(self.height, other.height), max(self.width, other.width)
        return _Bucket(height, width, self.images + other.images, self.members + other.members)


def choose_buckets(sizes: Sequence[Size], batch: int, count: int) -> dict[Size, Size]:
    """Maps each image size to its padded size, of which there are at most `count`.

    Starting with one bucket per size, the two whose union adds the fewest pixels, counted in full batches, are joined
    until at most `count` are left, and then as long as joining adds no pixels.
    """
    buckets = _first_buckets(sizes)
    while len(buckets) > 1:
        added, a, b = min(
            (buckets[a].join(buckets[b]).cost(batch) - buckets[a].cost(batch) - buckets[b].cost(batch), a, b)
            for a, b in itertools.combinations(range(len(buckets)), 2)
        )
        if added > 0 and len(buckets) <= count:
            break
        buckets[a] = buckets[a].join(buckets.pop(b))
    return {member: (bucket.height, bucket.width) for bucket in buckets for member in bucket.members}


def _first_buckets(sizes: Sequence[Size]) -> list[_Bucket]:
    """Returns one bucket per size, or per group of similar sizes if there are too many."""
    counts = collections.Counter(sizes)
    for multiple in (2**power for power in itertools.count()):
        buckets: dict[Size, _Bucket] = {}
        for size, images in sorted(counts.items()):
            key = (-(-size[0] // multiple), -(-size[1] // multiple))
            bucket = _Bucket(*size, images, (size,))
            buckets[key] = buckets[key].join(bucket) if key in buckets else bucket
        if len(buckets) <= _MOST_BUCKETS:
            return list(buckets.values())
    raise AssertionError("unreachable: some multiple exceeds every size")


def eval_batches(
    source: Source,
    options: EvalOptions,
    *,
    indices: Sequence[int] | None = None,
    ahead: int = 2,
    on_error: Callable[[int, DataError], None] | None = None,
) -> Iterator[EvalBatch]:
    """Yields every record of a source once, in batches of at most `options.buckets` padded sizes.

    Args:
      source: with or without labels.
      options: see `EvalOptions`.
      indices: records to read; default all.
      ahead: batches decoded ahead.
      on_error: receives the index and the error of a record that cannot be read, which is left out; by default the
        error is raised.

    Raises:
      DataError: a file cannot be used.
    """
    share = options.batch // options.process_count
    rows = slice(options.process_index * share, (options.process_index + 1) * share)
    indices = range(len(source)) if indices is None else indices
    plan = [(size, members[rows]) for size, members in _plan(source, indices, options)]
    for (size, members), records in _read_ahead(source, plan, options.threads, ahead):
        readable = []
        for index, record in zip(members, records, strict=True):
            if not isinstance(record, DataError):
                readable.append((index, record))
            elif on_error is None:
                raise record
            else:
                on_error(index, record)
        yield _padded(readable, share, size, options)


def _plan(source: Source, indices: Sequence[int], options: EvalOptions) -> list[tuple[Size, list[int]]]:
    """Returns the padded size and the records of each batch."""
    sizes = {index: _least_padded(source.size(index), options) for index in indices}
    bucket_of = choose_buckets(list(sizes.values()), options.batch, options.buckets)
    by_bucket = collections.defaultdict(list)
    for index in indices:
        by_bucket[bucket_of[sizes[index]]].append(index)
    return [
        (size, members[start : start + options.batch])
        for size, members in by_bucket.items()
        for start in range(0, len(members), options.batch)
    ]


def _padded(records: list, rows: int, size: Size, options: EvalOptions) -> EvalBatch:
    """Returns the batch of `rows` of `size` that holds (index, record) pairs."""
    images = np.zeros((rows, *size, 3), np.uint8)
    labels = np.full((rows, *size), options.ignore, np.uint8)
    sizes = np.zeros((rows, 2), np.int32)
    for row, (_, record) in enumerate(records):
        record = _center_crop(record, options.crop)
        height, width = sizes[row] = record["image"].shape[:2]
        images[row, :height, :width] = record["image"]
        if "label" in record:
            labels[row, :height, :width] = record["label"]
    return EvalBatch(images, labels, sizes, tuple(index for index, _ in records))


def _read_ahead(source: Source, plan: list, threads: int, ahead: int) -> Iterator[tuple]:
    """Yields each entry (size, indices) of the plan with its records, or DataErrors of those that cannot be read."""

    def read(index: int):
        try:
            return source[index]
        except DataError as error:
            return error

    with ThreadPoolExecutor(threads, thread_name_prefix="eval") as pool:
        pending: collections.deque[list[Future]] = collections.deque()
        try:
            for number, entry in enumerate(plan):
                for _, members in plan[number + len(pending) : number + 1 + ahead]:
                    pending.append([pool.submit(read, index) for index in members])
                yield entry, [future.result() for future in pending.popleft()]
        finally:
            for future in itertools.chain.from_iterable(pending):
                future.cancel()  # A consumer that stops early must not wait for pending images.


def _least_padded(size: Size, options: EvalOptions) -> Size:
    """Returns the size of an image after the center crop, rounded up to multiples of `options.size_multiple`."""
    multiple = options.size_multiple
    return tuple(-(-(min(side, options.crop) if options.crop else side) // multiple) * multiple for side in size)


def _center_crop(record: dict[str, np.ndarray], crop: int) -> dict[str, np.ndarray]:
    if not crop:
        return record
    y, x = (max((side - crop) // 2, 0) for side in record["image"].shape[:2])
    return {key: array[y : y + crop, x : x + crop] for key, array in record.items()}
