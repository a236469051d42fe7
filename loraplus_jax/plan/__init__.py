"""Plans: what a training step needs on TPUs, from the compiled program, without weights or data."""
