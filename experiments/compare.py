"""Compares methods: trains methods x splits x seeds of a config, and tables and plots their scores.

    python -m benchmarks.compare --config=configs/shapes.py --methods supervised fixmatch unimatch dssn \
        --splits 4 8 32 --seeds 3 --out=/runs/compare
    python -m benchmarks.compare --out=/runs/compare --table-only

A run is OUT/runs/NAME, a work directory of main.py. The same command continues what was stopped: finished runs are
skipped, an unfinished one goes on from its checkpoint. Other methods, splits, seeds or values of a grid may be added to
OUT later; what all runs share (config, --set) may not change. Every method has the same number of steps and the same
images a step: supervised learning has twice the labeled ones (`configs/methods.py`).

A finished run keeps its best checkpoint (--keep): with a teacher three times the parameters, without one twice; an
unfinished run holds two. Compiled programs are kept in OUT/compiled, so that no seed or continued run compiles again
what another has compiled; that folder may be deleted.
"""

import argparse
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
from ml_collections import config_flags

from configs import checks, defaults
from configs.methods import METHODS
from dssn_jax import distributed, errors
from dssn_jax import validate as configuration
from dssn_jax.training import loop as train
from dssn_jax.workdir import checkpoint, recorder
from dssn_jax.workdir import restore as saved_run
from dssn_jax.workdir.recorder import duration
from experiments import compare_results
from experiments.compare_results import RUNS


class Variant(NamedTuple):
    """A method of configs/methods.py, and the configuration keys that are then set."""

    method: str
    overrides: dict[str, str] = {}


# What may be compared. Those with overrides are DSSN without, or with another form of, one of its parts.
VARIANTS = {
    "supervised": Variant("supervised"),
    "fixmatch": Variant("fixmatch"),
    "unimatch": Variant("unimatch"),
    "dssn": Variant("dssn"),
    "dssn-threshold": Variant("dssn", {"method.selection": "threshold"}),
    "dssn-no-image-contrast": Variant("dssn", {"method.image_contrast_weight": "0.0"}),
    "dssn-no-feature-contrast": Variant("dssn", {"method.feature_contrast_weight": "0.0"}),
    "dssn-no-feature-views": Variant("dssn", {"method.feature_views": "0", "method.feature_contrast_weight": "0.0"}),
    "dssn-no-teacher": Variant("dssn", {"method.teacher": "student_eval"}),
    "dssn-partner-same": Variant("dssn", {"views.mix_partner": "same"}),
    "dssn-partner-other": Variant("dssn", {"views.mix_partner": "other"}),
}
KEEP = ("best", "all", "none")
START_SECONDS = 30.0  # With less time left than this no run is begun: it would hardly do more than load and compile.
_SPLIT_ARGUMENT = {"shapes": "labeled"}  # Which argument of a config file names the split; others: "split".
# Keys that change no score, so that they may differ between the pieces of a comparison.
_FREE = (
    "name", "data.root", "data.workers", "data.threads", "data.buffer", "train.log_every", "train.checkpoint_every",
    "train.pictures",
)  # fmt: skip


class Run(NamedTuple):
    """One cell of the comparison and one seed. `values` are those of the grid."""

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
    """What all runs share: the config file with its arguments, and the keys set for all."""

    config: str
    overrides: dict[str, str]

    def configure(self, variant: Variant, split: str | None = None, overrides: dict[str, str] | None = None):
        """Returns the configuration of `variant` on `split` (None: that of the config file), with `overrides` last."""
        file, _, argument = self.config.partition(":")
        arguments = [argument] if argument else []
        if split is not None:
            arguments.append(f"{_SPLIT_ARGUMENT.get(pathlib.Path(file).stem, 'split')}={split}")
        spec = f"{file}:{','.join([*arguments, f'method={variant.method}'])}"
        pictures = {"train.pictures": "0"}  # Nobody looks at so many.
        settings = pictures | self.overrides | variant.overrides | (overrides or {})
        config = read_config(spec, settings)
        if variant.method == "supervised" and "data.labeled_batch" in settings:
            config.data.labeled_batch *= 2  # As `configs.methods.apply` did, before it was set to something else.
        return config

    def configure_run(self, run: Run):
        return self.configure(VARIANTS[run.variant], run.split, run.values | {"seed": str(run.seed)})


def read_config(spec: str, overrides: dict[str, str]):
    """Returns the configuration that `main.py --config=SPEC --config.KEY=VALUE ...` has; raises ConfigError."""
    arguments = ["compare", f"--config={spec}", *(f"--config.{key}={value}" for key, value in overrides.items())]
    checks.check_keys(arguments, defaults.get_config())
    parser = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, flag_values=parser, sys_argv=arguments, lock_config=True)
    try:
        parser(arguments)
        holder.value.name  # noqa: B018  A file that cannot be read is noticed here.
    except flags.Error as error:
        raise checks.ConfigError(str(error)) from None
    except OSError:
        raise checks.ConfigError(checks.unreadable_config_file(spec.partition(":")[0])) from None
    return holder.value


def parse_settings(texts: Sequence[str], option: str) -> dict[str, str]:
    """Splits KEY=VALUE texts into a dict; raises ConfigError for one that is not, or is not to be set by `option`."""
    settings = {}
    for text in texts:
        key, equals, value = text.removeprefix("config.").partition("=")
        if not equals or not value:
            raise checks.ConfigError(f"{option} {text}: expected KEY=VALUE, such as optimizer.lr=0.01")
        if key in ("seed", "method.name"):
            raise checks.ConfigError(f"{option} {text}: seeds come from --seeds, methods from --methods")
        settings[key] = value
    return settings


def choose_variants(names: Sequence[str], comparison: Comparison, split: str) -> list[str]:
    """Returns the variants that `names` ask for; "all" are those whose overrides change something in the config."""
    changing = {}
    for name in VARIANTS if "all" in names else names:
        variant = VARIANTS[name]
        plain = comparison.configure(variant._replace(overrides={}), split)
        changing[name] = not variant.overrides or _changes(plain, comparison.configure(variant, split))
        if name in names and not changing[name]:
            raise checks.ConfigError(f"--methods {name}: changes nothing, {variant.method} is so in this config")
    return [name for name, changes in changing.items() if changes]


def plan(variants: Sequence[str], splits: Sequence[str], grid: dict[str, list[str]], seeds: int) -> list[Run]:
    """The runs, a whole table of the first seed first: what is stopped early is a table with fewer seeds."""
    for name in variants:
        for key in grid.keys() & VARIANTS[name].overrides.keys():
            raise checks.ConfigError(f"--grid {key}: {name} is told from others by that key")
    values = [dict(zip(grid, combination, strict=True)) for combination in itertools.product(*grid.values())]
    cells = itertools.product(range(seeds), splits, values, variants)
    return [Run(variant, split, chosen, seed) for seed, split, chosen, variant in cells]


def _changes(before, after) -> list[str]:
    """Lists the differences of two configurations that may change scores."""
    return checks.differences(json.loads(before.to_json()), json.loads(after.to_json()), free=_FREE)


def open_folder(out: pathlib.Path, comparison: Comparison, command: str) -> None:
    """Makes `out`, or checks that it holds runs of the same comparison; raises ConfigError."""
    path = out / compare_results.COMPARISON
    base, commands = comparison.configure(VARIANTS["dssn"]), []
    if path.exists():
        found = saved_run.read_json(out, compare_results.COMPARISON)
        changes = _changes(saved_run.complete(found["base"]), base)
        if changes:
            raise checks.ConfigError(
                f"{out} holds runs of another comparison, of {found['config']}: {'; '.join(changes)}. Take "
                "another --out"
            )
        commands = found["commands"]
    out.mkdir(parents=True, exist_ok=True)
    content = {"config": comparison.config, "commands": list(dict.fromkeys([*commands, command]))}
    recorder.write_json(path, content | {"base": json.loads(base.to_json())})


def is_finished(workdir: pathlib.Path, config) -> bool:
    """Whether the run of `config` in `workdir` needs no more training; raises ConfigError if it is another run."""
    if not (workdir / saved_run.CONFIG).exists():
        return False
    changes = _changes(saved_run.read_config(workdir), config)
    if changes:
        raise checks.ConfigError(
            f"{workdir} is a run of another configuration: {'; '.join(changes)}. Delete it, or take another --out"
        )
    return (workdir / compare_results.RESULT).exists()


class Compilations:
    """Counts the programs that JAX compiles, those that it finds compiled, and the seconds that either takes."""

    _COUNTED = {
        "/jax/compilation_cache/cache_misses": "compiled",
        "/jax/compilation_cache/cache_hits": "found_compiled",
    }
    _TIMED = "/jax/core/compile/backend_compile_duration"

    def __init__(self):
        self._counts: dict[str, float] = {}
        self.take()
        jax.monitoring.register_event_listener(self._count)
        jax.monitoring.register_event_duration_secs_listener(self._time)

    def take(self) -> dict[str, float]:
        """Returns the counts since the last call."""
        taken = self._counts
        self._counts = dict.fromkeys([*self._COUNTED.values(), "compile_seconds"], 0)
        return taken

    def _count(self, event: str, **_) -> None:
        if event in self._COUNTED:
            self._counts[self._COUNTED[event]] += 1

    def _time(self, event: str, seconds: float, **_) -> None:
        if event == self._TIMED:
            self._counts["compile_seconds"] += seconds


def share_compiled_programs(folder: pathlib.Path) -> None:
    """Makes JAX keep what it compiles in `folder`, unless it was told of another one."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def carry_out(run: Run, config, workdir: pathlib.Path, keep: str, deadline: float, fit: Callable, programs) -> None:
    """Trains `run` to its end and writes its result; a run that diverges has that for a result.

    Raises PreemptedError when `deadline` comes first.
    """
    programs.take()
    result = {**run._asdict(), "changes": VARIANTS[run.variant].overrides}
    try:
        summary = fit(config, workdir, deadline)
    except train.DivergedError as error:
        summary, result["diverged"] = {}, str(error)
    recorder.log_to(None)
    counts = programs.take()
    recorder.write_json(workdir / compare_results.RESULT, result | counts)
    print("compiled {compiled} programs, found {found_compiled}: {compile_seconds:.1f} s".format(**counts), flush=True)
    if keep != "all":
        prune(workdir, summary.get("best_step") if keep == "best" else None)
    jax.clear_caches()  # A program is in memory once for each run that used it, else.


def prune(workdir: pathlib.Path, kept: int | None) -> None:
    """Deletes the checkpoints of a finished run but that of step `kept`."""
    for folder in (workdir / checkpoint.FOLDER).glob("*"):
        if folder.name.isdigit() and folder.name != str(kept):
            shutil.rmtree(folder)


def carry_out_all(
    comparison: Comparison, runs: list[Run], out: pathlib.Path, keep: str, deadline: float, fit: Callable = train.train
) -> int:
    """Carries out what is left of `runs` until `deadline` (of time.monotonic); returns how many are left then.

    `fit` is called with (config, workdir, deadline), as `train.train`. All configurations are checked before any run.
    """
    configs = [comparison.configure_run(run) for run in runs]
    for config in configs:
        configuration.validate(config, jax.device_count())
    pairs = zip(runs, configs, strict=True)
    left = [(run, config) for run, config in pairs if not is_finished(out / RUNS / run.name, config)]
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them finished", flush=True)
    programs, started = Compilations(), time.monotonic()
    for number, (run, config) in enumerate(left):
        now = time.monotonic()
        if deadline - now < START_SECONDS:
            return len(left) - number
        ahead = f", about {duration((now - started) / number * (len(left) - number))} left" if number else ""
        print(f"run {number + 1} of {len(left)}: {run.name}{ahead}", flush=True)
        try:
            carry_out(run, config, out / RUNS / run.name, keep, deadline, fit, programs)
        except distributed.PreemptedError as stopped:
            if time.monotonic() < deadline:
                raise
            print(stopped, flush=True)
            return len(left) - number
        compare_results.write_tables(out)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a config file, with arguments after a colon that hold for all runs")
    parser.add_argument("--methods", nargs="+", choices=[*VARIANTS, "all"], default=list(METHODS))
    parser.add_argument("--splits", nargs="+", help="values of the config's argument `split` (of shapes: `labeled`)")
    parser.add_argument("--seeds", type=int, default=3, help="runs a cell, with the seeds 0, 1, ...")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config keys of all runs")
    parser.add_argument(
        "--grid", nargs="+", default=[], metavar="KEY=VALUE,VALUE", help="each method is run with each combination"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of runs and results")
    parser.add_argument("--keep", choices=KEEP, default="best", help="checkpoints of a finished run that stay")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="saves and stops, with exit code 0, after these"
    )
    parser.add_argument("--table-only", action="store_true", help="trains nothing; results of the runs that there are")
    return parser.parse_args()


def compare(arguments: argparse.Namespace) -> None:
    """Does what the command line asks for; raises the errors of `dssn_jax.errors`."""
    deadline = time.monotonic() + 60 * arguments.minutes
    left = 0
    if arguments.table_only:
        if not (arguments.out / compare_results.COMPARISON).exists():
            raise checks.ConfigError(f"--out={arguments.out}: no comparison has been run there")
    else:
        if arguments.config is None or arguments.splits is None:
            raise checks.ConfigError("--config and --splits are needed, unless it is --table-only")
        comparison = Comparison(arguments.config, parse_settings(arguments.set, "--set"))
        grid = {key: text.split(",") for key, text in parse_settings(arguments.grid, "--grid").items()}
        variants = choose_variants(arguments.methods, comparison, arguments.splits[0])
        runs = plan(variants, arguments.splits, grid, arguments.seeds)
        open_folder(arguments.out, comparison, shlex.join(["python", "-m", "benchmarks.compare", *sys.argv[1:]]))
        share_compiled_programs(arguments.out / "compiled")
        left = carry_out_all(comparison, runs, arguments.out, arguments.keep, deadline)
    compare_results.write(arguments.out)
    print(f"{left} runs are left: the same command continues" if left else "no run is left", flush=True)


def main() -> None:
    arguments = parse_arguments()
    flags.FLAGS(["compare"])  # Processes that make batches read them.
    recorder.quiet_libraries()
    try:
        compare(arguments)
    except errors.ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    main()
