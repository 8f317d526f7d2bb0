"""Time ring attention: `python -m mtraining.bench.ring`."""

import sys

from mtraining.bench.ring.run import main

if __name__ == "__main__":
    sys.exit(main())
