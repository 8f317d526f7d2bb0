"""Time attention alone: `python -m mtraining.bench.attention`."""

import sys

from mtraining.bench.attention.run import main

if __name__ == "__main__":
    sys.exit(main())
