"""Pictures and an HTML page from a run folder's files."""

from mtraining.report.page import write_report

__all__ = ["write_report"]
