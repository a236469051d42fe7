"""What a tuned adapter is for: predict, generate, export."""
