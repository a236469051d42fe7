"""Weights on disk: loading, merging, quantizing, exporting."""
