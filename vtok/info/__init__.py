"""What `vtok info` tells: of a run, an export or a file, and of a training that has not begun."""
