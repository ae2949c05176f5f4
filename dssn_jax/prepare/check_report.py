"""The outcome of `check` as text and as JSON."""

import os
from collections.abc import Sequence

import numpy as np

from dssn_jax.prepare.check import FIX, Report

_SHOWN = 5  # Items of a finding in the text.
_SIZES = ("smallest", "median", "largest")


def text(report: Report) -> str:
    """Returns the tables and findings, for a terminal."""
    root = report.root and report.root + os.sep
    lines = [*_table(_images(report)), "", *_table(_classes(report)), ""]
    for finding in report.findings:
        sign = "FIX " if finding.level == FIX else "note"
        lines.append(f"{sign}  {finding.title}: {len(finding.items)}")
        lines += [f"        {item.replace(root, '')}" for item in finding.items[:_SHOWN]]
        if len(finding.items) > _SHOWN:
            lines.append(f"        ... {len(finding.items) - _SHOWN} more")
        lines.append(f"      > {finding.advice}")
    lines.append(f"{report.defects} to fix" if report.defects else "nothing to fix")
    # Names of files may hold bytes that are no text; a terminal cannot show them.
    return os.fsencode("\n".join(lines)).decode(errors="backslashreplace")


def as_json(report: Report) -> dict:
    """Returns everything, with all items of all findings."""
    return {
        "images": report.images,
        "sizes": {part: dict(zip(_SIZES, _sizes(found), strict=True)) for part, found in report.sizes.items()},
        "classes": {
            name: {
                part: {"pixels": int(report.pixels[part][i]), "images": int(report.occurrences[part][i])}
                for part in report.pixels
            }
            for i, name in enumerate(report.classes)
        },
        "ignored_pixels": report.ignored,
        "masks_counted": report.masks,
        "findings": [finding._asdict() for finding in report.findings],
        "to_fix": report.defects,
    }  # fmt: skip


def _sizes(sizes: Sequence[tuple[int, int]]) -> tuple[str, str, str]:
    """Least, median and greatest WIDTHxHEIGHT, each side by itself."""
    if not sizes:
        return "-", "-", "-"
    found = np.array(sizes)
    sides = (found.min(0), np.median(found, axis=0).astype(int), found.max(0))
    return tuple(f"{width}x{height}" for height, width in sides)


def _images(report: Report) -> list[list[str]]:
    rows = [["", *report.images], ["images", *map(str, report.images.values())]]
    rows.append(["readable", *(str(len(sizes)) for sizes in report.sizes.values())])
    rows.append(["masks counted", *(str(report.masks.get(part, "")) for part in report.images)])
    for number, name in enumerate(_SIZES):
        rows.append([f"{name} size", *(_sizes(sizes)[number] for sizes in report.sizes.values())])
    return rows


def _classes(report: Report) -> list[list[str]]:
    """Share of the pixels that are not ignored, and of the images, by class, in masks that could be counted."""
    rows = [["class", *(f"{part} {what}" for part in report.pixels for what in ("pixels", "images"))]]
    for i, name in enumerate(report.classes):
        row = [f"{i} {name}"]
        for part in report.pixels:
            row.append(_share(report.pixels[part][i], report.pixels[part].sum()))
            row.append(f"{report.occurrences[part][i]} ({_share(report.occurrences[part][i], report.masks[part])})")
        rows.append(row)
    ignored = ["ignored"]
    for part in report.pixels:
        ignored += [_share(report.ignored[part], report.ignored[part] + report.pixels[part].sum()), ""]
    return [*rows, ignored]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "-"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, padded, strict=True)]
