"""Pages to look at and to send: runs side by side, and a model's attention on one text."""

from mtraining.report.compare import watch_report, write_report

__all__ = ["watch_report", "write_report"]
