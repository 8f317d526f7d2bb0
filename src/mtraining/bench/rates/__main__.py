"""Measure a GPU's rates: `python -m mtraining.bench.rates`."""

import sys

from mtraining.bench.rates.run import main

if __name__ == "__main__":
    sys.exit(main())
