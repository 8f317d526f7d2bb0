"""Time whole training steps: `python -m mtraining.bench.train`."""

from mtraining.bench.processes import leave
from mtraining.bench.train.run import main

if __name__ == "__main__":
    leave(main())
