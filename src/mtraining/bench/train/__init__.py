"""Time whole training steps; run.py is where to start."""
