"""`python -m mtraining.cli` is the `mtraining` command."""

from mtraining.cli import entry

entry()
