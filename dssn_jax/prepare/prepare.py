"""Preparing a data set before training: `--mode=check`, `--mode=split` and `--mode=records`."""

import pathlib
from collections.abc import Sequence

from etils import epath

from configs.checks import ConfigError, check_output_file
from dssn_jax.prepare import check_report
from dssn_jax.prepare.check import Report, check_data
from dssn_jax.prepare.make_splits import SplitSummary, make_splits
from dssn_jax.prepare.pack import PackResult, pack_files
from dssn_jax.workdir import records
from dssn_jax.workdir.logs import logger
from input_pipeline.errors import UserError


class DefectsError(UserError):
    """The data have problems that must be fixed; `check` has printed them."""


def check(config, *, to: str | None = None) -> Report:
    """Checks all data of `config`, prints the report and, if `to` is given, writes it to that JSON file.

    Raises:
      DefectsError: the report, which is complete, has problems that must be fixed.
      DataError: there is nothing to check.
      ConfigError: `to` cannot be written.
    """
    path = epath.Path(to) if to else None
    if path is not None:
        check_output_file(path, check_report.MADE_BY)
    report = check_data(config)
    print(check_report.to_text(report))
    if path is not None:
        records.write_json(path, check_report.to_json(report))
        logger.info("wrote %s", path)
    if report.defects:
        raise DefectsError(f"the data of {config.data.root}: {report.defects} to fix, see above")
    return report


def split(config, subsets: Sequence[str], *, stratify: bool = True, to: str = "") -> list[SplitSummary]:
    """Writes split lists of the data of `config`, see `make_splits`, and logs how to train on them."""
    if config.data.source != "folder":
        raise ConfigError(
            f"config.data.source is {config.data.source!r}; expected 'folder': --mode=split writes lists of files"
        )
    to = str(pathlib.Path(to).absolute()) if to else ""
    summaries = make_splits(config.data, subsets, seed=config.seed, stratify=stratify, to=to)
    for summary in summaries:
        absent = f"; no image of: {', '.join(summary.absent)}" if summary.absent else ""
        logger.info(
            "%s: %d labeled, %d unlabeled, %d validation images%s",
            summary.name, summary.labeled, summary.unlabeled, summary.val, absent,
        )  # fmt: skip
    option = f" with --config.data.splits={to}" if to else ""
    logger.info("wrote the lists; to train on them, use the config argument split=%s%s", summaries[0].name, option)
    return summaries


def pack(config, to: str) -> PackResult:
    """Packs the files of `config` into the folder `to`, see `pack_files`, and logs how to train on it."""
    result = pack_files(config, to)
    shards, rows = result.index.shards, result.index.rows
    if result.without_mask:
        logger.info(
            "%d images were packed without a mask: only the list of unlabeled images names it, and it does not exist",
            result.without_mask,
        )
    logger.info(
        "%s: %d images, %d masks, %.1f MB in %d shards, %d of which existed already",
        to, len(rows), sum(row.mask is not None for row in rows), sum(shard.bytes for shard in shards) / 1e6,
        len(shards), result.kept,
    )  # fmt: skip
    logger.info(
        "to train on it: --config.data.source=array_record --config.data.root=%s --config.data.split=%s",
        to, result.split,
    )  # fmt: skip
    return result
