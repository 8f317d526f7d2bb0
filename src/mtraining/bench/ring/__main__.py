"""Time ring attention: `python -m mtraining.bench.ring`."""

from mtraining.bench.processes import leave
from mtraining.bench.ring.run import main

if __name__ == "__main__":
    leave(main())
