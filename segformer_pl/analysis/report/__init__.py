"""The report of a run: one self-contained HTML file, made from the files in its run folder."""

from segformer_pl.analysis.report.page import write_report
from segformer_pl.analysis.report.results import summary

__all__ = ["summary", "write_report"]
