"""What users do with their images before they train: `--mode=check`, `--mode=split` and `--mode=records`."""

import pathlib

from etils import epath

from configs.checks import ConfigError, check_output_file
from dssn_jax.prepare import check, check_report, make_splits, pack
from dssn_jax.workdir import recorder
from dssn_jax.workdir.recorder import logger
from input_pipeline.errors import UserError


class DefectsError(UserError):
    """Something in the data must be fixed; `check` has told what."""


def check(config, target: str | None = None) -> check.Report:
    """Looks through all the data of `config`, prints what was found and writes it to the JSON file `target`, if given.

    Raises DefectsError, at the end, if something must be fixed; DataError or ConfigError if nothing could be read.
    """
    recorder.log_to(None)
    path = epath.Path(target) if target else None
    if path is not None:
        check_output_file(path)
    report = check.check(config)
    print(check_report.text(report))
    if path is not None:
        recorder.write_json(path, check_report.as_json(report))
        logger.info("wrote %s", path)
    if report.defects:
        raise DefectsError(f"the data of {config.data.root}: {report.defects} to fix, see above")
    return report


def split(config, subsets: list[str], stratify: bool, target: str = "") -> list[make_splits.Made]:
    """Makes split lists of the data of `config`, see `make_splits.make_splits`, and says how to train on them."""
    recorder.log_to(None)
    if config.data.source != "folder":
        raise ConfigError(f"config.data.source is {config.data.source!r}; --mode=split makes lists of files: 'folder'")
    target = str(pathlib.Path(target).absolute()) if target else ""
    made = make_splits.make_splits(config.data, subsets, config.seed, stratify, target)
    for subset in made:
        lacks = f"; no image of: {', '.join(subset.absent)}" if subset.absent else ""
        logger.info(
            "%s: %d labeled, %d unlabeled, %d validation images%s",
            subset.name, subset.labeled, subset.unlabeled, subset.val, lacks,
        )  # fmt: skip
    elsewhere = f" with --config.data.splits={target}" if target else ""
    logger.info("wrote the lists; config argument split=%s%s trains on them", made[0].name, elsewhere)
    return made


def pack(config, target: str) -> pack.Packed:
    """Packs the files of `config` into the folder `target`, see `pack.pack`, and says how to train on it."""
    recorder.log_to(None)
    packed = pack.pack(config, target)
    shards, rows = packed.index.shards, packed.index.rows
    if packed.without_mask:
        logger.info(
            "%d masks do not exist that only the list of unlabeled images names; packed without them",
            packed.without_mask,
        )
    logger.info(
        "%s: %d images, %d masks, %.1f MB; shards: %d, of which %d were there already",
        target, len(rows), sum(row.mask is not None for row in rows), sum(shard.bytes for shard in shards) / 1e6,
        len(shards), packed.kept,
    )  # fmt: skip
    logger.info(
        "train on it with --config.data.source=array_record --config.data.root=%s --config.data.split=%s",
        target, packed.split,
    )  # fmt: skip
    return packed
