"""The report of a run: one HTML file, made from nothing but what the run left in its folder."""

from segformer_pl.analysis.report.page import write_report
from segformer_pl.analysis.report.results import summary

__all__ = ["summary", "write_report"]
