"""Data: download, read, split, label, tokenize and batch."""
