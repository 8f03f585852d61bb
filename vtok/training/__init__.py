"""What drives a run: Lightning modules, strategies, checkpoints, what it tells of itself and what it watches for."""
