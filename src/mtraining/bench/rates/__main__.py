"""Measure a GPU's rates: `python -m mtraining.bench.rates`."""

from mtraining.bench.processes import leave
from mtraining.bench.rates.run import main

if __name__ == "__main__":
    leave(main())
