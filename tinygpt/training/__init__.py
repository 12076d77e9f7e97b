"""One step, a run of many, its settings, and what it leaves on the disk."""
