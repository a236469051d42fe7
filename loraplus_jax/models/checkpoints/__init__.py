"""A model's files: names, loading, quantizing."""
