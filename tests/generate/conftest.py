"""The small models are those of the tests of gradients."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "model"))
