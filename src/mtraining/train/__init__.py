"""Configuration, step, loop, optimizer, checkpoint, metrics."""
