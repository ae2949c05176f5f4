"""Settings that must precede the first use of JAX (CPU, four simulated devices) and small programs to share."""

import gc
import importlib.metadata
import logging
import os
import pathlib
import socket
from collections.abc import Callable
from typing import NamedTuple

# Compiling takes most of the time of the tests: compiled programs are kept for the next session, and the processes that
# tests start read them too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".jax_cache"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # Threads of PyTorch wait busily for a processor that others use.
# Compiled faster; the programs run for seconds at most.
ONE_DEVICE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA refuses flags that it does not know.
    ONE_DEVICE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{ONE_DEVICE} --xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from configs import shapes
from dssn_jax import sharding
from dssn_jax.learner import learner as learners
from dssn_jax.learner.learner import Learner
from dssn_jax.learner.state import TrainState
from input_pipeline.pipeline import RunLength

# Files that take longest start first, so that no process works alone at the end.
LONGEST_FIRST = (
    "training/test_loop.py", "learner/test_step.py", "test_golden.py", "attacks/test_attacks.py",
    "learner/test_vit_step.py", "test_distributed.py", "test_faults.py", "training/test_workers.py",
    "learner/test_tpu.py", "input_pipeline/test_pipeline.py",
)  # fmt: skip


def pytest_collection_finish():
    """Collects garbage less often, and not what is imported: tracing makes many small objects, which stay in use."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    root = pathlib.Path(__file__).parent
    items.sort(key=lambda item: rank.get(item.path.relative_to(root).as_posix(), len(rank)))


def free_port() -> int:
    """Returns a port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(autouse=True, scope="session")
def parsed_flags():
    """grain's worker processes read absl's flags."""
    flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True)
def restored_logging():
    """Undoes what a command line changed: its handlers write to streams that are closed after the test."""
    loggers = [logging.getLogger(name) for name in (None, "dssn", "absl")]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny_config():
    """Returns a function (method, SECTION__KEY=value, ...) -> configuration of a small network on a few small images.

    What makes programs larger and few tests need is left out: further ASPP dilations, the EMA teacher's epochs with
    batch statistics.
    """

    def make(method: str = "dssn", **options):
        config = shapes.get_config(f"method={method},encoder=resnet10w16,crop=33,labeled=8,steps=6")
        config.model.update({"decoder_channels": 16, "aspp_dilations": (2,)})
        config.data.labeled_batch = config.data.unlabeled_batch = 4
        config.data.shapes.update({"size": 48, "unlabeled": 16, "val": 6})
        config.ema.update({"warmup_steps": 1, "decay": 0.9, "batch_stats_epochs": 0})
        config.train.update({"log_every": 1, "eval_every": 3})
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in options.items()})
        return config

    return make


class Program(NamedTuple):
    """A learner with its compiled step."""

    learner: Learner
    init_state: Callable[[], TrainState]  # Returns a new copy of the state at step 0: the step donates its argument.
    step: Callable  # (state, batch) -> (state, metrics).


@pytest.fixture(scope="session")
def program(tiny_config):
    """Returns a function (method, devices=1, SECTION__KEY=value, ...) -> Program of `tiny_config`.

    Equal arguments give the same program, which is traced and compiled once per session.
    """
    programs = {}

    def make(method: str = "dssn", devices: int = 1, **options) -> Program:
        config = tiny_config(method, **options)
        key = (config.to_json(), devices, jax.config.jax_enable_x64)
        if key not in programs:
            length = RunLength(config.train.steps, config.data.shapes.unlabeled // config.data.unlabeled_batch)
            learner = learners.build(config, sharding.make_mesh(jax.devices()[:devices]), length)
            state = learner.init_state()
            programs[key] = Program(learner, lambda: jax.tree.map(jnp.copy, state), learner.make_train_step())
        return programs[key]

    return make
