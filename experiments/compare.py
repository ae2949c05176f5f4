"""Compares methods: trains methods x splits x seeds of a config file, and tables and plots their scores.

    python -m experiments.compare --config=configs/shapes.py --methods supervised fixmatch unimatch dssn \
        --splits 4 8 32 --seeds 3 --out=/runs/compare
    python -m experiments.compare --out=/runs/compare --table-only

A run is OUT/runs/NAME, a work directory of main.py. The same command resumes a comparison that was stopped: finished
runs are skipped and an unfinished one continues from its checkpoint. Methods, splits, seeds and values of a grid may be
added to OUT later; what all runs share (config file, --set) may not change. Every method takes the same number of steps
with the same number of images per step: supervised learning has labeled images in place of the unlabeled ones. But
fixmatch_balanced has half as many images again: the labeled ones of supervised learning, and the unlabeled ones.

A finished run keeps its best checkpoint (--keep): three times the size of the parameters with a teacher, twice without.
An unfinished run has two. Compiled programs are kept in OUT/compiled, so that a program is compiled once for all seeds
and continued runs; that folder may be deleted.
"""

import argparse
import fnmatch
import functools
import itertools
import json
import math
import pathlib
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from absl import flags

from configs.checks import ConfigError, score_changes, suggest
from configs.kinds import show
from configs.methods import METHODS
from dssn_jax import auto_config, commands, distributed
from dssn_jax.training import loop
from dssn_jax.validate import validate_training
from dssn_jax.workdir import checkpoint, logs, records
from dssn_jax.workdir.logs import duration
from experiments import compare_results
from experiments.compilations import Compilations, keep_programs
from input_pipeline.errors import UserError


class Variant(NamedTuple):
    """A method of configs/methods.py, with values of further configuration keys."""

    method: str
    overrides: dict[str, str] = {}


_ENTRY = METHODS["fixmatch_balanced"]
_BALANCED = {f"method.{key}": str(_ENTRY[key]) for key in ("class_weight_power", "logit_adjustment")}
_BALANCED |= {f"data.{key}": str(value) for key, value in _ENTRY["data"].items()}
_MOMENTUM = {"method.selection_momentum": "0.98"}  # Runs of a comparison are short.
_UNADJUSTED = {"method.logit_adjustment": "0.0"}
_LABELED = {"views.mix_partner": "labeled"}
# Ablations of fixmatch_balanced: end of the name -> values of keys.
_PARTS = {
    "no-logit-adjustment": _UNADJUSTED,
    **{f"logit-adjustment{value}": {"method.logit_adjustment": value} for value in ("-0.2", "-0.25", "-0.33")},
    "no-class-weights": {**_UNADJUSTED, "method.class_weight_power": "0.0"},
    "half-class-weights": {**_UNADJUSTED, "method.class_weight_power": "0.25"},
    "weigh-pseudo-labels": {**_UNADJUSTED, "method.weigh_pseudo_labels": "True"},
    "no-rare-sampling": {"data.labeled_sampling": "uniform"},
    "half-labeled": {"method.labeled_batch_factor": "1"},
    "half-strong-weight": {"method.strong_weight": "0.5"},
    "aligned": {"method.align_classes": "True", **_MOMENTUM},
    "class-aware": {"method.selection": "class_aware"},
    "adaptive": {"method.selection": "adaptive", **_MOMENTUM},
    "soft": {"method.selection": "soft", **_MOMENTUM},
    "class-balanced": {"method.selection": "class_balanced", **_MOMENTUM},
}
# Values of --methods. Variants with overrides are ablations: a method without a part, or with another form of it; the
# supervised ones measure the same parts without unlabeled images.
VARIANTS = {
    "supervised": Variant("supervised"),
    "fixmatch": Variant("fixmatch"),
    "unimatch": Variant("unimatch"),
    "unimatch_v2": Variant("unimatch_v2"),
    "dssn": Variant("dssn"),
    "dssn-threshold": Variant("dssn", {"method.selection": "threshold"}),
    "dssn-no-image-contrast": Variant("dssn", {"method.image_contrast_weight": "0.0"}),
    "dssn-no-feature-contrast": Variant("dssn", {"method.feature_contrast_weight": "0.0"}),
    "dssn-no-feature-views": Variant("dssn", {"method.feature_views": "0", "method.feature_contrast_weight": "0.0"}),
    "dssn-no-teacher": Variant("dssn", {"method.teacher": "student_eval"}),
    "dssn-partner-same": Variant("dssn", {"views.mix_partner": "same"}),
    "dssn-partner-other": Variant("dssn", {"views.mix_partner": "other"}),
    "fixmatch_balanced": Variant("fixmatch_balanced"),
    **{f"fixmatch_balanced-{name}": Variant("fixmatch_balanced", keys) for name, keys in _PARTS.items()},
    # The recipe, and its parts, with labeled images pasted instead of unlabeled ones.
    "fixmatch_balanced-partner-labeled": Variant("fixmatch_balanced", _LABELED),
    "fixmatch_balanced-partner-labeled-paste-classes": Variant(
        "fixmatch_balanced", {**_LABELED, "views.paste_classes": "2"}
    ),
    **{
        f"fixmatch_balanced-partner-labeled-{name}": Variant("fixmatch_balanced", {**_LABELED, **keys})
        for name, keys in _PARTS.items()
    },
    "supervised-balanced": Variant("supervised", _BALANCED),
    "supervised-balanced-no-logit-adjustment": Variant("supervised", {**_BALANCED, **_UNADJUSTED}),
}
KEEP = ("best", "all", "none")
START_SECONDS = 30.0  # No run is started with less time left than this: it would do little more than compile.
_SPLIT_ARGUMENT = {"shapes": "labeled"}  # Config file -> its argument that names the split; others: "split".


class Run(NamedTuple):
    """A cell of the comparison with one seed; `values` are those of the grid."""

    variant: str
    split: str
    values: dict[str, str]
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        values = [f"{key}={value}".replace("/", "-") for key, value in self.values.items()]
        return "_".join([self.variant, self.split, *values, f"seed{self.seed}"])


class Comparison(NamedTuple):
    """The config file with its arguments, and the values of keys, that are common to all runs."""

    config: str
    overrides: dict[str, str]

    def configure(self, variant: Variant, split: str | None = None, overrides: dict[str, str] | None = None):
        """Returns the configuration of `variant` on `split` (None: that of the config file); `overrides` win.

        Raises ConfigError.
        """
        file, _, argument = self.config.partition(":")
        arguments = [argument] if argument else []
        if split is not None:
            arguments.append(f"{_SPLIT_ARGUMENT.get(pathlib.Path(file).stem, 'split')}={split}")
        arguments.append(f"method={variant.method}")
        # No panels by default: nobody looks at those of so many runs.
        keys = {"train.pictures": "0", **self.overrides, **variant.overrides, **(overrides or {})}
        settings = [f"--config.{key}={value}" for key, value in keys.items()]
        _, values = commands.parse(["--mode=check", f"--config={file}:{','.join(arguments)}", *settings])
        return values["config"].value

    def configure_run(self, run: Run):
        return self.configure(VARIANTS[run.variant], run.split, run.values | {"seed": str(run.seed)})


def parse_settings(texts: Sequence[str], option: str) -> dict[str, str]:
    """Splits KEY=VALUE texts into a dict; raises ConfigError for a text or key that `option` does not take."""
    settings = {}
    for text in texts:
        key, equals, value = text.removeprefix("config.").partition("=")
        if not equals or not value:
            raise ConfigError(f"{option} {text}: expected KEY=VALUE, such as optimizer.lr=0.01")
        if key in ("seed", "method.name"):
            raise ConfigError(f"{option} {text}: seeds come from --seeds, methods from --methods")
        settings[key] = value
    return settings


def choose_variants(patterns: Sequence[str], comparison: Comparison, split: str) -> list[str]:
    """Returns the variants that match `patterns`, such as "dssn" or "dssn*", and change something in the config.

    Raises ConfigError for a pattern without such a variant.
    """
    chosen = []
    for pattern in patterns:
        matched = fnmatch.filter(VARIANTS, pattern)
        if not matched:
            raise ConfigError(f"--methods: unknown method {show(pattern)}{suggest(pattern, VARIANTS)}")
        changing = [name for name in matched if _is_another(VARIANTS[name], comparison, split)]
        if not changing:
            method = VARIANTS[matched[0]].method
            raise ConfigError(f"--methods {pattern}: the same as {method}, whose values this config already has")
        chosen += changing
    return list(dict.fromkeys(chosen))


def _is_another(variant: Variant, comparison: Comparison, split: str) -> bool:
    """Returns whether `variant` is a method itself, or its overrides change something in the config."""
    if not variant.overrides:
        return True
    plain = comparison.configure(variant._replace(overrides={}), split)
    return bool(_changes(plain, comparison.configure(variant, split)))


def plan(variants: Sequence[str], splits: Sequence[str], grid: dict[str, list[str]], seeds: int) -> list[Run]:
    """Returns the runs, seed by seed: a comparison that is stopped early is a complete table with fewer seeds."""
    for name in variants:
        for key in grid.keys() & VARIANTS[name].overrides.keys():
            raise ConfigError(f"--grid {key}: {name} sets that key")
    values = [dict(zip(grid, combination, strict=True)) for combination in itertools.product(*grid.values())]
    cells = itertools.product(range(seeds), splits, values, variants)
    return [Run(variant, split, chosen, seed) for seed, split, chosen, variant in cells]


def _changes(before, after) -> list[str]:
    return score_changes(json.loads(before.to_json()), json.loads(after.to_json()))


def prepare_folder(out: pathlib.Path, comparison: Comparison, command: str) -> None:
    """Creates `out`, or checks that it has runs of the same comparison, and notes `command`; raises ConfigError."""
    path = out / compare_results.COMPARISON
    base, earlier = comparison.configure(VARIANTS["dssn"]), []
    if path.exists():
        saved = compare_results.read_comparison(out)
        if changes := _changes(records.with_defaults(saved["base"]), base):
            raise ConfigError(
                f"{out} has runs of another comparison, of {saved['config']}: {'; '.join(changes)}. Choose another "
                "--out"
            )
        earlier = saved["commands"]
    out.mkdir(parents=True, exist_ok=True)
    content = {"config": comparison.config, "commands": list(dict.fromkeys([*earlier, command]))}
    records.write_json(path, content | {"base": json.loads(base.to_json())})


def is_finished(workdir: pathlib.Path, config) -> bool:
    """Returns whether the run of `config` in `workdir` is finished; raises ConfigError if it is another run."""
    if not (workdir / records.CONFIG).exists():
        return False
    saved = records.read_config(workdir)
    if changes := _changes(saved, auto_config.copy_choices(config, saved)):
        raise ConfigError(
            f"{workdir} is a run of another configuration: {'; '.join(changes)}. Delete it, or choose another --out"
        )
    return (workdir / compare_results.RESULT).exists()


def execute(run: Run, config, workdir: pathlib.Path, train: Callable, programs: Compilations) -> int | None:
    """Trains `run` until it ends or diverges, and writes its result; returns the best step, if it has one."""
    programs.take()
    result, summary = {**run._asdict(), "changes": VARIANTS[run.variant].overrides}, {}
    try:
        summary = train(config, workdir)
    except loop.DivergedError as error:
        result["diverged"] = str(error)
    counts = programs.take()
    records.write_json(workdir / compare_results.RESULT, result | counts)
    print("programs: {compiled} compiled, {loaded} loaded, {compile_seconds:.1f} s".format(**counts), flush=True)
    return summary.get("best_step")


def prune(workdir: pathlib.Path, kept: int | None) -> None:
    """Deletes the checkpoints of a finished run except that of step `kept`."""
    for folder in (workdir / checkpoint.FOLDER).glob("*"):
        if folder.name.isdigit() and folder.name != str(kept):
            shutil.rmtree(folder)


def execute_all(
    comparison: Comparison, runs: list[Run], out: pathlib.Path, keep: str, deadline: float, train: Callable = loop.train
) -> int:
    """Executes the unfinished ones of `runs` until `deadline` (of time.monotonic); returns how many then remain.

    All configurations are checked before the first run. `train` is called as `dssn_jax.training.loop.train`. Raises
    PreemptedError if a run is stopped by something other than the deadline.
    """
    configs = [comparison.configure_run(run) for run in runs]
    for config in configs:
        validate_training(config, jax.device_count())
    pairs = zip(runs, configs, strict=True)
    unfinished = [
        (run, config) for run, config in pairs if not is_finished(out / compare_results.RUNS / run.name, config)
    ]
    print(f"{len(runs)} runs, {len(runs) - len(unfinished)} of them finished", flush=True)
    programs, started = Compilations(), time.monotonic()
    for number, (run, config) in enumerate(unfinished):
        now, remaining = time.monotonic(), len(unfinished) - number
        if deadline - now < START_SECONDS:
            return remaining
        estimate = f", about {duration((now - started) / number * remaining)} left" if number else ""
        print(f"run {number + 1} of {len(unfinished)}: {run.name}{estimate}", flush=True)
        workdir = out / compare_results.RUNS / run.name
        try:
            best = execute(run, config, workdir, functools.partial(train, deadline=deadline), programs)
        except distributed.PreemptedError as stopped:
            if time.monotonic() < deadline:
                raise
            print(stopped, flush=True)
            return remaining
        if keep != "all":
            prune(workdir, best if keep == "best" else None)
        jax.clear_caches()  # Otherwise the programs of every run stay in memory.
        compare_results.write_tables(out)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="config file, with arguments for all runs after a colon")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS),
        help="methods of configs/methods.py (default: all of them), or variants of them (VARIANTS in this module); "
        "'dssn*', in quotes, is dssn and all its variants",
    )  # fmt: skip
    parser.add_argument("--splits", nargs="+", help="values of the config file's argument split (shapes: labeled)")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs per cell, with seeds 0, 1, ...")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config keys of all runs")
    parser.add_argument(
        "--grid", nargs="+", default=[], metavar="KEY=VALUE,VALUE", help="run each method with each combination"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs and results")
    parser.add_argument("--keep", choices=KEEP, default="best", help="checkpoints of a finished run to keep")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="save and stop, with exit code 0, after this time"
    )
    parser.add_argument("--table-only", action="store_true", help="train nothing; write the results of finished runs")
    return parser.parse_args()


def compare(arguments: argparse.Namespace) -> None:
    """Executes the command line; raises UserError."""
    deadline = time.monotonic() + 60 * arguments.minutes
    left, out = 0, arguments.out
    if arguments.table_only:
        if not (out / compare_results.COMPARISON).exists():
            raise ConfigError(f"--out={out}: has no {compare_results.COMPARISON}; expected the folder of a comparison")
    else:
        if arguments.config is None or arguments.splits is None:
            raise ConfigError("--config and --splits are required without --table-only")
        distributed.start_devices()
        comparison = Comparison(arguments.config, parse_settings(arguments.set, "--set"))
        grid = {key: text.split(",") for key, text in parse_settings(arguments.grid, "--grid").items()}
        variants = choose_variants(arguments.methods, comparison, arguments.splits[0])
        runs = plan(variants, arguments.splits, grid, arguments.seeds)
        prepare_folder(out, comparison, shlex.join(["python", "-m", "experiments.compare", *sys.argv[1:]]))
        keep_programs(out / "compiled")
        left = execute_all(comparison, runs, out, arguments.keep, deadline)
    compare_results.write(out)
    print(f"{left} runs are left: repeat the command to continue" if left else "all runs are finished", flush=True)


def main() -> None:
    arguments = parse_arguments()
    flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl's flags.
    logs.quiet_libraries()
    try:
        compare(arguments)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    main()
