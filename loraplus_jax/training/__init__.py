"""A training run: setup, training loop, evaluation, output directory and logs."""
