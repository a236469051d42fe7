"""GGUF files: load and export."""
