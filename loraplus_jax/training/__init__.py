"""One training run: setup, trainer, evaluation, checkpoints on disk, logs."""
