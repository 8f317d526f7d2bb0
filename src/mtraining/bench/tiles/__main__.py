"""Measure tile sizes: `python -m mtraining.bench.tiles`."""

import sys

from mtraining.bench.tiles.run import main

if __name__ == "__main__":
    sys.exit(main())
