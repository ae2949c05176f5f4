"""Settings that must precede the first use of JAX: CPU only, four simulated devices; and small configurations."""

import importlib.metadata
import os
import tempfile

# Compiling takes most of the time of the tests. They, and the processes that they start, share what was compiled.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="dssn_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiled faster; the programs run for seconds at most.
ONE_DEVICE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA refuses flags that it does not know.
    ONE_DEVICE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{ONE_DEVICE} --xla_force_host_platform_device_count=4"

import pytest
from absl import flags

from configs import shapes


@pytest.fixture(autouse=True, scope="session")
def parsed_flags():
    """Grain's worker processes read absl's flags."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["tests"])


@pytest.fixture(scope="session")
def tiny_config():
    """Returns a function that makes a configuration of a small network on a few small images, by method."""

    def make(method: str = "dssn", **options):
        config = shapes.get_config(f"method={method},encoder=resnet10w16,crop=33,labeled=8,steps=6")
        config.model.decoder_channels = 16
        config.data.labeled_batch = config.data.unlabeled_batch = 4
        config.data.shapes.update({"size": 48, "unlabeled": 16, "val": 6})
        config.ema.update({"warmup_steps": 1, "keep_rate": 0.9})
        config.train.update({"log_every": 1, "eval_every": 3})
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in options.items()})
        return config

    return make
