"""Pytest plugin: the traceback of a failed test on a GPU is shown at once.

Pytest shows tracebacks when all tests have run, and a machine that is lent for a time may be gone by then. Under
pytest-xdist the tests' reports reach the first process, where this prints them.
"""

from __future__ import annotations

from typing import Any

import pytest


class EarlyFailures:
    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A report's keywords hold the names of its test's markers."""
        terminal: Any = self._plugins.get_plugin("terminalreporter")  # none in xdist's workers
        if report.failed and "gpu" in report.keywords and terminal is not None:
            terminal.ensure_newline()
            terminal.write_sep("_", f"{report.nodeid} ({report.when})")
            terminal.write_line(report.longreprtext)
            terminal.flush()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(EarlyFailures(config))
