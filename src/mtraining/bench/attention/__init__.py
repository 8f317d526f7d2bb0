"""Time attention alone; run.py is where to start."""
