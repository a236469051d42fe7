"""Plans: what a step needs on TPUs, from the compiled program, without weights or data."""
