"""Plans a run (learner, data, length) from a configuration, before anything is written."""

from typing import NamedTuple

import jax

from dssn_jax import auto_config
from dssn_jax.evaluation.evaluate import Evaluator, log_progress
from dssn_jax.learner import learner as learner_lib
from dssn_jax.learner.learner import Learner
from dssn_jax.validate import validate_training
from input_pipeline import class_statistics
from input_pipeline.batch import labeled_rows
from input_pipeline.pipeline import RunLength, run_length
from input_pipeline.sources.encoded import check_records
from input_pipeline.sources.open import Sources, open_sources


class Run(NamedTuple):
    """A planned run: learner, data and length."""

    learner: Learner  # Its config has a value for every key.
    evaluator: Evaluator
    sources: Sources
    length: RunLength
    notes: list[str]  # For the log: why auto-configuration chose the values that were unset.


def plan(config) -> Run:
    """Opens the data, fills in unset keys and builds learner and evaluator for all devices; writes nothing.

    Raises ConfigError or DataError for what cannot be trained.
    """
    devices = jax.devices()
    validate_training(config, len(devices))
    sources = open_sources(config)
    if class_statistics.is_counted(config):  # The first time, with progress; what needs the result gets it again.
        progress = log_progress(len(sources.labeled), "counting the pixels of each class")
        class_statistics.count_pixels(sources.labeled, config.data, progress)
    config, chosen = auto_config.fill_in(config, sources, devices)
    if config.method.reason:
        chosen.insert(0, f"method={config.method.name}: {config.method.reason}")
    validate_training(config, len(devices))  # Given and chosen values together.
    length = run_length(sources, config)
    learner = learner_lib.build(config, length=length)
    return Run(learner, Evaluator(learner), sources, length, [f"chosen: {reason}" for reason in chosen])


def check_labels(sources: Sources) -> list[str]:
    """Decodes the labeled and validation images and their masks once; returns warnings for the log.

    An image that an evaluation cannot read would otherwise end the run after an epoch. Raises DataError.
    """
    warnings = [check_records(source) for source in (sources.val, sources.labeled)]
    return [f"WARNING: {warning}" for warning in warnings if warning]


def batch_sizes(config) -> dict[str, int]:
    """Returns the number of images per step over all processes: labeled and, if the method uses them, unlabeled."""
    sizes = {"labeled": labeled_rows(config)}
    if config.method.strong_views or config.method.feature_views:
        sizes["unlabeled"] = config.data.unlabeled_batch
    return sizes


def run_info(run: Run) -> dict:
    """Returns what was built from the configuration and where it runs, the content of `run.json`."""
    params = run.learner.abstract_state().student["params"]
    counts = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in run.learner.optimizer.partition(params)]
    return {
        "name": run.learner.config.name,
        "parameters": sum(counts),
        "frozen_parameters": counts[1],
        "images": {name: len(source) for name, source in run.sources._asdict().items()},
        "batch": batch_sizes(run.learner.config),
        "steps": run.length.steps,
        "steps_per_epoch": run.length.steps_per_epoch,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "devices_per_process": jax.local_device_count(),
        "jax": jax.__version__,
    }


def describe(config: dict, info: dict) -> str:
    """Describes a run, given its configuration as a dict and its `run_info`, in one line."""
    data, micro_batches = config["data"], config["train"]["accumulation"]
    factor = config["method"]["labeled_batch_factor"]
    texts = {name: f"{size} {name}" for name, size in info["batch"].items()}
    if factor > 1:
        texts["labeled"] += f" (data.labeled_batch {data['labeled_batch']} x {factor})"
    processes, devices = info["processes"], info["devices_per_process"]
    shares = " + ".join(str(size // (processes * devices * micro_batches)) for size in info["batch"].values())
    layout = f"{processes} processes x {devices} devices x {shares} images per device"
    layout += f" x {micro_batches} micro-batches" if micro_batches > 1 else ""
    images = ", ".join(f"{count} {name}" for name, count in info["images"].items())
    network = f"{config['model']['encoder']} with {_parameters(info)}"
    return (
        f"{info['name'] or 'run'}: {network}, {len(data['classes'])} classes; "
        f"{images} images; {info['steps']} steps ({info['steps_per_epoch']} per epoch) of {' + '.join(texts.values())} "
        f"images ({layout}) at crop {data['crop']}; {info['devices']}"
    )


def _parameters(info: dict) -> str:
    total, frozen = (info[key] / 1e6 for key in ("parameters", "frozen_parameters"))
    split = f" ({total - frozen:.1f} M trained, {frozen:.1f} M frozen)" if frozen else ""
    return f"{total:.1f} M parameters{split}"
