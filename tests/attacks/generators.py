"""The kinds of attacks; which one has which number follows from the seed alone."""

import random
from collections.abc import Sequence

from tests.attacks import data, disks, flags, keys, signals, two_processes, weights, workdirs
from tests.attacks.attack import Attack
from tests.attacks.fixtures import Place

# Kind -> generator (place, random numbers) -> Attack, and how often it is drawn.
KINDS = {
    "keys": (keys.generate, 300),
    "workdir": (workdirs.generate, 260),
    "data": (data.generate, 200),
    "weights": (weights.generate, 110),
    "flags": (flags.generate, 120),
    "disks": (disks.generate, 8),
    "signals": (signals.generate, 6),
    "processes": (two_processes.generate, 4),
}


def make(place: Place, seed: int, index: int, kinds: Sequence[str]) -> tuple[str, Attack]:
    """Returns kind and attack number `index` of a seed, prepared in `place`."""
    rng = random.Random(f"{seed}/{index}")
    (kind,) = rng.choices(kinds, [KINDS[kind][1] for kind in kinds])
    return kind, KINDS[kind][0](place, rng)
