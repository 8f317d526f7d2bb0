"""Time attention on a ring of processes, and check the ring against one process."""
