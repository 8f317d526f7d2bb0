"""`mtraining bench rates`: what `mtraining plan` must know of a GPU."""
