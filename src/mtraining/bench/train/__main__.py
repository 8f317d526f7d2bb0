"""Time whole training steps: `python -m mtraining.bench.train`."""

import sys

from mtraining.bench.train.run import main

if __name__ == "__main__":
    sys.exit(main())
