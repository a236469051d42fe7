"""Uses tuned models: predict, generate, export."""
