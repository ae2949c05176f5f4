"""The run report: one HTML page about one or several runs, made from their work directories; `--mode=report`."""

from dssn_jax.report.page import report

__all__ = ["report"]
