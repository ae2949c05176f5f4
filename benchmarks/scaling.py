"""Estimates what a compiled training step costs on more devices: nothing is compiled or run here.

    python -m benchmarks.scaling docs/results/compiled/voc_r101_h100x8.json

Files are results of `benchmarks.compiled` for several devices. More devices get the same number of images each, so
kernels, collectives and their bytes are those of the file: collectives reduce parameters, batch-norm statistics and
sums over pixels, whose sizes depend neither on the number of devices nor on that of the images. A collective of all
devices stays one; one of a group keeps its size.

- computation: the file's roofline, which no step is faster than. A step that is slower than its roofline hides more.
- bytes: rings; an all-reduce of b bytes over g devices sends 2 (g - 1) / g * b bytes out of each, other collectives
  (g - 1) / g * b. The bandwidth is that inside a machine if all devices are in one, else that between machines, from
  `network` in `benchmarks/targets`, with its sources.
- latency: 2 log2(g) messages per collective, of `seconds_per_message`, which is a guess.
- collectives that the schedule runs beside kernels are hidden; they cost what they take longer than the computation.

Columns: collectives per step and their MB; GB sent by a device; ms of computation, of collectives that are waited for
and of hidden ones; of the step; share of the computation in it, also with 8 times the images per device.
"""

import argparse
import json
import math
import pathlib
import sys

from benchmarks import compiled, tables
from configs.checks import ConfigError

DEVICES = (8, 16, 64, 256)
MORE_IMAGES = 8


def read(path: pathlib.Path) -> dict:
    """Reads a result of `benchmarks.compiled`; raises ConfigError if it is none, or not of several devices."""
    try:
        result = json.loads(path.read_text())
        several = result["devices"] > 1 and bool(result["collectives"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: no result of this version of `python -m benchmarks.compiled --json`") from None
    if not several:
        raise ConfigError(f"{path}: a step of one device; expected several, such as --topology=1x1x8")
    return result


def estimate(result: dict, network: dict, devices: int) -> dict:
    """Returns the columns of the table for `devices` with the work and the collectives of `result` each."""
    rows = result["collectives"]
    waited, hidden = (sum(seconds(row, network, devices, overlapped) for row in rows) for overlapped in (False, True))
    compute = result["roofline_ms"] / 1e3

    def step(factor: float) -> float:
        return factor * compute + waited + max(0.0, hidden - factor * compute)

    return {
        "devices": devices,
        "collectives": sum(row["count"] for row in rows),
        "MB": sum(row["MB"] for row in rows),
        "GB sent": sum(ring_share(row, devices) * row["MB"] for row in rows) / 1e3,
        "compute ms": 1e3 * compute,
        "waited ms": 1e3 * waited,
        "hidden ms": 1e3 * hidden,
        "step ms": 1e3 * step(1),
        "share": compute / step(1),
        f"share, {MORE_IMAGES} x": MORE_IMAGES * compute / step(MORE_IMAGES),
    }


def seconds(row: dict, network: dict, devices: int, overlapped: bool) -> float:
    """Returns the time of a row's collectives: of those beside kernels, or of the others."""
    count, megabytes = row["overlapped"], row["overlapped_MB"]
    if not overlapped:
        count, megabytes = row["count"] - count, row["MB"] - megabytes
    bandwidth = network["bytes_per_second"]["machine" if devices <= network["machine"] else "beyond"]
    messages = count * 2 * math.log2(row["group"] or devices)
    return ring_share(row, devices) * megabytes * 1e6 / bandwidth + messages * network["seconds_per_message"]


def ring_share(row: dict, devices: int) -> float:
    """Returns the bytes that a device sends in a ring per byte of the collective."""
    group = row["group"] or devices
    return (2 if row["kind"] == "all-reduce" else 1) * (group - 1) / group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE", help="JSON of benchmarks.compiled")
    parser.add_argument("--devices", nargs="+", type=int, default=DEVICES)
    parser.add_argument("--json", type=pathlib.Path, help="file of the results")
    arguments = parser.parse_args()
    rows = []
    try:
        for path in arguments.files:
            result = read(path)
            network = compiled.read_target(result["target"]).network
            named = {"program": path.stem, "images": result["images_per_device"]}
            rows += [named | estimate(result, network, devices) for devices in arguments.devices]
    except ConfigError as error:
        sys.exit(f"error: {error}")
    tables.write(arguments.json, {"rows": rows})
    tables.show(rows)


if __name__ == "__main__":
    main()
