"""Measure tile sizes; run.py is where to start."""
