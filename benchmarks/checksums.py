"""Time of saving a checkpoint, with and without checksums: `python -m benchmarks.checksums --encoder=resnet50`.

Saves the random state of a DSSN run to a temporary folder, several times; the time is until the files are complete.
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
    """Returns a row with the median seconds of a save without checksums, and those that the checksums add."""
    state = learner.build(config).init_state()
    meta = {"config": json.loads(config.to_json()), "scores": new_scores()}
    saves, added, busy = [], [], []
    with (
        tempfile.TemporaryDirectory(prefix="dssn_save_", dir=folder) as workdir,
        contextlib.closing(checkpoint.Checkpointer(workdir)) as saved,
    ):
        for step in range(repeats):
            started, cpu = time.perf_counter(), time.process_time()
            summaries = checksums.summarize(state)
            added.append(time.perf_counter() - started)
            busy.append(time.process_time() - cpu)
            with mock.patch.object(checksums, "summarize", lambda _, known=summaries: known):
                started = time.perf_counter()
                saved.save(step, state, meta)
                saved.wait()
                saves.append(time.perf_counter() - started)
    save, extra, cpu = map(statistics.median, (saves, added, busy))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return {"state MB": size / 1e6, "save s": save, "checksums s": extra, "CPU s": cpu, "share %": 100 * extra / save}


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
