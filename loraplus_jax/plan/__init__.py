"""Plans: what a training step needs on GPUs and TPUs, from the compiled program, without weights or data."""
