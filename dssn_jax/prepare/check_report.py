"""The outcome of `check_data` as text and as JSON."""

import os
from collections.abc import Sequence

import numpy as np
import tabulate

from dssn_jax.prepare.check import KINDS, Report
from input_pipeline.errors import printable

MADE_BY = "dssn_jax check"  # Marks the file, which a later check may replace.
_SHOWN = 5  # Items of a finding in the text.
_SIZES = ("smallest", "median", "largest")


def to_text(report: Report) -> str:
    """Returns the tables and findings, for a terminal."""
    root = report.root and report.root + os.sep
    lines = [_table(_image_rows(report)), "", _table(_class_rows(report)), ""]
    for finding in report.findings:
        kind, count = KINDS[finding.kind], len(finding.items)
        lines.append(f"{'FIX ' if finding.must_fix else 'note'}  {kind.title}: {count}")
        lines += [f"        {item.replace(root, '')}" for item in finding.items[:_SHOWN]]
        if count > _SHOWN:
            lines.append(f"        ... {count - _SHOWN} more")
        lines.append(f"      > {kind.advice}")
    lines.append(f"{report.defects} to fix" if report.defects else "nothing to fix")
    return "\n".join(line for block in lines for line in map(printable, block.split("\n")))


def to_json(report: Report) -> dict:
    """Returns the whole report, with all items of all findings."""
    return {
        "made_by": MADE_BY,
        "images": {name: split.images for name, split in report.splits.items()},
        "sizes": {name: dict(zip(_SIZES, _sizes(split.sizes), strict=True)) for name, split in report.splits.items()},
        "classes": {
            label: {
                name: {"pixels": int(split.pixels[i]), "images": int(split.occurrences[i])}
                for name, split in report.labeled_splits.items()
            }
            for i, label in enumerate(report.classes)
        },
        "ignored_pixels": {name: split.ignored for name, split in report.labeled_splits.items()},
        "masks_counted": {name: split.masks for name, split in report.labeled_splits.items()},
        "findings": [
            {"kind": finding.kind, **KINDS[finding.kind]._asdict(), "items": finding.items}
            for finding in report.findings
        ],
        "to_fix": report.defects,
    }


def _sizes(sizes: Sequence[tuple[int, int]]) -> tuple[str, str, str]:
    """Returns the smallest, median and largest WIDTHxHEIGHT of (height, width) pairs, each side by itself."""
    if not sizes:
        return "-", "-", "-"
    sides = np.min(sizes, 0), np.median(sizes, 0).astype(int), np.max(sizes, 0)
    return tuple(f"{width}x{height}" for height, width in sides)


def _image_rows(report: Report) -> list[list]:
    splits = report.splits.values()
    rows = [
        ["", *report.splits],
        ["images", *(split.images for split in splits)],
        ["readable", *(len(split.sizes) for split in splits)],
        ["masks counted", *(split.masks for split in splits)],
    ]
    by_size = zip(*(_sizes(split.sizes) for split in splits), strict=True)
    return rows + [[f"{name} size", *sizes] for name, sizes in zip(_SIZES, by_size, strict=True)]


def _class_rows(report: Report) -> list[list]:
    """Returns each class's share of the pixels that are not ignored, and of the images, in the usable masks."""
    splits = report.labeled_splits
    rows = [["class", *(f"{name} {what}" for name in splits for what in ("pixels", "images"))]]
    for i, label in enumerate(report.classes):
        row = [f"{i} {printable(label)}"]
        for split in splits.values():
            row.append(_percent(split.pixels[i], split.pixels.sum()))
            row.append(f"{split.occurrences[i]} ({_percent(split.occurrences[i], split.masks)})")
        rows.append(row)
    ignored = ["ignored"]
    for split in splits.values():
        ignored += [_percent(split.ignored, split.ignored + split.pixels.sum()), ""]
    return [*rows, ignored]


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.2f}%" if total else "-"


def _table(rows: list[list]) -> str:
    align = ("left", *["right"] * (len(rows[0]) - 1))
    return tabulate.tabulate(rows, tablefmt="plain", colalign=align, disable_numparse=True)
