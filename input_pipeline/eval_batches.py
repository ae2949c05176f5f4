"""Batches for evaluation and prediction: images of any size, padded to a few sizes so that few programs compile."""

import collections
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from input_pipeline.errors import DataError, printable
from input_pipeline.sources.open import Source

_LARGE_STEPS = 4  # Per doubling of a side; similar sides are those within a step.
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

    def split(self, rows: int) -> Iterator["EvalBatch"]:
        """Yields batches of `rows` rows each."""
        for start in range(0, len(self.images), rows):
            yield EvalBatch(*(field[start : start + rows] for field in self))


class EvalOptions(NamedTuple):
    """How `eval_batches` groups and pads images.

    Attributes:
      batch: greatest number of rows per batch, over all processes; the last batch of a size may hold fewer images.
      ignore: label of the padding.
      buckets: greatest number of padded sizes; large images, and images that would be large if joined, have others.
      equal_sizes: whether a batch holds images of one size, without padding, whatever the number of sizes.
      crop: if not 0, the central `crop` x `crop` pixels of each image, or all of a side that is shorter.
      threads: number of threads that decode.
      process_index: index of this host.
      process_count: number of hosts; host i of n gets the rows [i b / n, (i + 1) b / n) of a batch of b.
      devices: number of devices, between which rows are divided equally.
      pixels: greatest number of padded pixels per device, if not 0; larger images have a device for themselves.
    """

    batch: int
    ignore: int = 255
    buckets: int = 4
    equal_sizes: bool = False
    crop: int = 0
    threads: int = 16
    process_index: int = 0
    process_count: int = 1
    devices: int = 1
    pixels: int = 0

    def rows(self, size: Size) -> int:
        """Returns the number of rows in batches of this padded size."""
        most = self.batch // self.devices
        return self.devices * (min(most, max(1, self.pixels // math.prod(size))) if self.pixels else most)

    def is_large(self, size: Size) -> bool:
        """Whether an image of this padded size has a device for itself."""
        return 0 < self.pixels < math.prod(size)


class _Bucket(NamedTuple):
    height: int
    width: int
    images: int
    members: tuple[Size, ...]

    @property
    def size(self) -> Size:
        return self.height, self.width

    def cost(self, options: EvalOptions) -> int:
        """Returns the pixels per channel of the batches that its images fill, padding included."""
        rows = options.rows(self.size)
        return math.ceil(self.images / rows) * rows * math.prod(self.size)

    def join(self, other: "_Bucket") -> "_Bucket":
        height, width = max(self.height, other.height), max(self.width, other.width)
        return _Bucket(height, width, self.images + other.images, self.members + other.members)


def choose_buckets(sizes: Sequence[Size], options: EvalOptions) -> dict[Size, Size]:
    """Maps each image size to its padded size, of which there are at most `options.buckets`, and those of large images.

    Starting with one bucket per size, the two whose union adds the fewest pixels, counted in full batches, are joined
    until at most `options.buckets` are left, and then as long as joining adds no pixels. Unions that are large are not
    made: large images are joined only if their sides are similar, so that one does not enlarge the others.
    """
    large = [size for size in sizes if options.is_large(size)]
    buckets = _first_buckets([size for size in sizes if not options.is_large(size)])

    def added(a: int, b: int) -> float:
        union = buckets[a].join(buckets[b])
        costs = (bucket.cost(options) for bucket in (buckets[a], buckets[b]))
        return math.inf if options.is_large(union.size) else union.cost(options) - sum(costs)

    while len(buckets) > 1:
        least, a, b = min((added(a, b), a, b) for a, b in itertools.combinations(range(len(buckets)), 2))
        if least == math.inf or (least > 0 and len(buckets) <= options.buckets):
            break
        buckets[a] = buckets[a].join(buckets.pop(b))
    buckets += _group(large, lambda side: math.ceil(_LARGE_STEPS * math.log2(side)))
    return {member: bucket.size for bucket in buckets for member in bucket.members}


def _first_buckets(sizes: Sequence[Size]) -> list[_Bucket]:
    """Returns one bucket per size, or per group of similar sizes if there are too many."""
    for multiple in (2**power for power in itertools.count()):
        buckets = _group(sizes, lambda side, multiple=multiple: -(-side // multiple))
        if len(buckets) <= _MOST_BUCKETS:
            return buckets
    raise AssertionError("unreachable: some multiple exceeds every size")


def _group(sizes: Sequence[Size], key: Callable[[int], int]) -> list[_Bucket]:
    """Returns one bucket per group of sizes whose sides have equal keys."""
    buckets: dict[tuple[int, ...], _Bucket] = {}
    for size, images in sorted(collections.Counter(sizes).items()):
        bucket, keys = _Bucket(*size, images, (size,)), tuple(map(key, size))
        buckets[keys] = buckets[keys].join(bucket) if keys in buckets else bucket
    return list(buckets.values())


def eval_batches(
    source: Source,
    options: EvalOptions,
    *,
    indices: Sequence[int] | None = None,
    ahead: int = 2,
    on_error: Callable[[int, DataError], None] | None = None,
) -> Iterator[EvalBatch]:
    """Yields every record of a source once, in batches of few padded sizes; see `choose_buckets`.

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
    indices = range(len(source)) if indices is None else indices
    plan = [(size, _share(members, size, options)) for size, members in _plan(source, indices, options)]
    for (size, members), records in _read_ahead(source, plan, options.threads, ahead):
        readable = []
        for index, record in zip(members, records, strict=True):
            if not isinstance(record, DataError):
                readable.append((index, record))
            elif on_error is None:
                raise record
            else:
                on_error(index, record)
        yield _padded(readable, options.rows(size) // options.process_count, size, options)


def _share(members: list[int], size: Size, options: EvalOptions) -> list[int]:
    """Returns the records of a batch that are this process's."""
    rows = options.rows(size) // options.process_count
    return members[options.process_index * rows : (options.process_index + 1) * rows]


def padded_sizes(source: Source, options: EvalOptions, indices: Sequence[int] | None = None) -> dict[int, Size]:
    """Maps records of a source (default: all) to the sizes of their batches."""
    indices = range(len(source)) if indices is None else indices
    sizes = {index: _cropped_size(source.size(index), options.crop) for index in indices}
    if options.equal_sizes:
        return sizes
    bucket_of = choose_buckets(list(sizes.values()), options)
    return {index: bucket_of[size] for index, size in sizes.items()}


def _plan(source: Source, indices: Sequence[int], options: EvalOptions) -> list[tuple[Size, list[int]]]:
    """Returns the padded size and the records of each batch."""
    sizes, by_size = padded_sizes(source, options, indices), collections.defaultdict(list)
    for index in indices:
        by_size[sizes[index]].append(index)
    return [
        (size, members[start : start + options.rows(size)])
        for size, members in by_size.items()
        for start in range(0, len(members), options.rows(size))
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
        except MemoryError:
            return DataError(f"{printable(source.name(index))}: needs more memory than there is")

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


def _cropped_size(size: Size, crop: int) -> Size:
    """Returns the size of an image after the center crop."""
    return tuple(min(side, crop) if crop else side for side in size)


def _center_crop(record: dict[str, np.ndarray], crop: int) -> dict[str, np.ndarray]:
    if not crop:
        return record
    y, x = (max((side - crop) // 2, 0) for side in record["image"].shape[:2])
    return {key: array[y : y + crop, x : x + crop] for key, array in record.items()}
