"""Time of saving checkpoints: `python -m benchmarks.saving --encoder=resnet50`.

Saves the random state of a DSSN run, which every device holds, to a temporary folder, several times. Prints seconds for
which training waits, at the first save and later (median), until the files are complete, and of the checksums, which
are part of the wait. `XLA_FLAGS=--xla_force_host_platform_device_count=8` simulates eight devices on a CPU.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from unittest import mock

import jax

from benchmarks import tables
from configs import pascal
from dssn_jax.learner import learner
from dssn_jax.workdir import checkpoint, checksums
from dssn_jax.workdir.checkpoint import new_scores


def measure(config, repeats: int, folder: str | None = None) -> dict:
    """Returns a row with the seconds of a save; `repeats` is at least 2."""
    state = learner.build(config).init_state()
    meta = {"config": json.loads(config.to_json()), "scores": new_scores()}
    waits, saves, sums = [], [], []

    def summarize(state, original=checksums.summarize):
        started = time.perf_counter()
        summaries = original(state)
        sums.append(time.perf_counter() - started)
        return summaries

    with (
        tempfile.TemporaryDirectory(prefix="dssn_save_", dir=folder) as workdir,
        contextlib.closing(checkpoint.Checkpointer(workdir)) as saved,
        mock.patch.object(checksums, "summarize", summarize),
    ):
        for step in range(repeats):
            started = time.perf_counter()
            saved.save(step, state, meta)
            waits.append(time.perf_counter() - started)
            saved.wait()
            saves.append(time.perf_counter() - started)
    later, save, extra = (statistics.median(seconds[1:]) for seconds in (waits, saves, sums))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    waiting = {"first wait s": waits[0], "later waits s": later, "of which checksums s": extra}
    return {"devices": jax.device_count(), "state MB": size / 1e6, **waiting, "until complete s": save}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="Folder on the disk to save to (default: that of temporary files).")
    arguments = parser.parse_args()
    config = pascal.get_config(f"encoder={arguments.encoder}")
    tables.show([{"encoder": arguments.encoder} | measure(config, arguments.repeats, arguments.folder)])


if __name__ == "__main__":
    main()
