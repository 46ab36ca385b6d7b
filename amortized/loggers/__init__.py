"""Where a run's metrics go: a table on disk, and Weights & Biases."""
